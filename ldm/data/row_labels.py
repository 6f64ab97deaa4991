"""Class labels of the images of a folder: from the names of their folders, or a column of a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from ldm.data.rows import Rows
from ldm.data.tables import is_text
from ldm.data.unreadable import shown_names
from ldm.errors import UserError
from ldm.pipelines.class_names import Names, read_class_names

FROM_FOLDER = "folder"  # value of `label` that is not the name of a column
NUMBER = re.compile(r"-?\d{1,9}")


class ClassLookup:
    """Labels of classes by their names, or by their numbers.

    Args:
        names: the names of each class, the first of which is its name in items.
    """

    def __init__(self, names: Names) -> None:
        self.names = [each[0] for each in names]
        self._labels: dict[str, int] = {}
        for form in (str, _without_case):
            for label, each in enumerate(names):
                for name in each:
                    self._labels.setdefault(form(name), label)

    def __len__(self) -> int:
        return len(self.names)

    def label(self, value: str | int) -> int | None:
        """Return the label of a name or a number, or None if there is no such class."""
        for key in (str(value), _without_case(str(value))):
            if key in self._labels:
                return self._labels[key]
        number = _number(value)
        return number if number is not None and 0 <= number < len(self) else None


def add_labels(rows: Rows, source: str, class_names: str | Sequence[str] | None) -> list[str]:
    """Add the entries `class_label` and `human_label` to rows, and return the names of the classes.

    Rows without a known class are left out. If a column holds only numbers and `class_names` is None, they are the
    labels, without names.

    Args:
        rows: the images.
        source: "folder", or the name of a column of the table.
        class_names: see `known_classes`; None means the sorted names that occur.

    Raises:
        UserError: there is no such column, or no image has a known class.
    """
    if source == FROM_FOLDER:
        undecodable = [i for i, file in enumerate(rows.files) if not is_text(PurePosixPath(file).parent.name)]
        rows.leave_out(undecodable, "are in a folder whose name is not valid UTF-8", "rename the folders")
        values: list[Any] = [_class_value(PurePosixPath(file).parent.name) for file in rows.files]
        fault, advice = "are in no folder of a class", "move them to one folder for each class, or set label"
    else:
        values = [_class_value(value) for value in rows.column(source, "label")]
        fault, advice = f'have no class in the column "{source}"', "fill the column, or name another one"
    rows.entries["class_label"] = values
    rows.leave_out([i for i, value in enumerate(values) if value is None], fault, advice)
    values = rows.entries["class_label"]
    numbers = [_number(value) for value in values]
    if class_names is None and source != FROM_FOLDER and None not in numbers:
        return _add_numbers(rows, [number for number in numbers if number is not None])
    lookup = ClassLookup(found_names(values) if class_names is None else known_classes(class_names))
    rows.entries["class_label"] = [lookup.label(value) for value in values]
    wrong = [i for i, label in enumerate(rows.entries["class_label"]) if label is None]
    unknown = shown_names(list(dict.fromkeys(str(values[i]) for i in wrong)))
    rows.leave_out(
        wrong, f"have a class that is not among the {len(lookup)} class_names ({unknown})", "check class_names"
    )
    rows.entries["human_label"] = [lookup.names[label] for label in rows.entries["class_label"]]
    return lookup.names


def _add_numbers(rows: Rows, numbers: list[int]) -> list[str]:
    """Add labels that are numbers without names."""
    rows.entries["class_label"] = numbers
    rows.leave_out([i for i, number in enumerate(numbers) if number < 0], "have a label below 0", "count from 0")
    rows.entries["human_label"] = [str(number) for number in rows.entries["class_label"]]
    return []


def known_classes(class_names: str | Sequence[str]) -> Names:
    """Return the names of each class, from a list or a text file; see `read_class_names`.

    Raises:
        UserError: the file is missing, or two classes have the same name.
    """
    names = read_class_names(class_names)
    seen: set[str] = set()
    for name in (each[0] for each in names):
        if name in seen:
            raise UserError(f'class_names lists the class "{name}" twice; give each class its own name')
        seen.add(name)
    return names


def found_names(values: Iterable[str | int]) -> Names:
    """Return the names that occur, sorted; if all are numbers, sorted by their values."""
    names = sorted({str(value) for value in values})
    if all(NUMBER.fullmatch(name) for name in names):
        names.sort(key=int)
    return [(name,) for name in names]


def _class_value(value: Any) -> str | int | None:
    """Return the name of a folder or the value of a table as the name or number of a class; None if it is neither.

    Names are one line with single spaces, so that a text file and a command can hold them.
    """
    if isinstance(value, str):
        return " ".join(value.split()) or None if is_text(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == value and float(value).is_integer() else None


def _number(value: str | int) -> int | None:
    return int(value) if NUMBER.fullmatch(str(value)) else None


def _without_case(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
