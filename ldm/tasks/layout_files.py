"""Layouts of labelled boxes in JSON files, and the names of classes. Needs no torch.

A file holds one layout, or a list of them:

    {"boxes": [{"label": "Dog", "box": [left, top, right, bottom]}, ...]}

Positions are in [0, 1] of the width and height, or in pixels where the layout says `"size": [width, height]`. A label
is a class's name, or its number from 0.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError, did_you_mean

SHAPE = '{"boxes": [{"label": "Dog", "box": [left, top, right, bottom]}]}'


def read_layouts(path: Path) -> list[Any]:
    """The layouts in a file, not looked at yet.

    Raises:
        UserError: the file is missing, or is no JSON, or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f'there is no layout file "{path}"; check the path') from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f'cannot read the layout file "{path}": {error}; give JSON such as {SHAPE}') from None
    layouts = content if isinstance(content, list) else [content]
    if not layouts:
        raise UserError(f'the layout file "{path}" is empty; give JSON such as {SHAPE}')
    return layouts


def read_labels(path: Path) -> list[str]:
    """Names of classes, in their order: the lines of a text file, or the last column of a CSV file.

    OpenImages' own list, class-descriptions-boxable.csv, is such a file.

    Raises:
        UserError: the file is missing, is no text, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f'there is no file of labels "{path}"; check the path') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the labels "{path}": {error}; give UTF-8 text, one name a line') from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".csv":
        lines = [row[-1].strip() for row in csv.reader(lines)]
    if not lines:
        raise UserError(f'the file of labels "{path}" is empty; write one name a line')
    return lines


def resolve(layout: Any, names: Sequence[str]) -> dict[str, Any]:
    """A layout with numbers for labels and positions in [0, 1].

    Args:
        layout: as it stands in a file.
        names: of the classes; without any, labels must be numbers.

    Returns:
        The entry `boxes`: a list of `label`, `name` and `box`.

    Raises:
        UserError: it is no layout, or one of its boxes is none; the box is named.
    """
    if not isinstance(layout, dict) or not isinstance(layout.get("boxes"), list):
        raise UserError(f"no list of boxes; a layout is {SHAPE}")
    for key in layout:
        if key not in ("boxes", "size"):
            raise UserError(f'"{key}" is not known{did_you_mean(key, ("boxes", "size"))}; a layout has boxes and size')
    if not layout["boxes"]:
        raise UserError("there is no box; give at least one")
    size = layout.get("size", [1, 1])
    if not _numbers(size, 2) or min(size) <= 0:
        raise UserError(f'"size" must be [width, height] in pixels, not {json.dumps(size)}')
    return {"boxes": [_resolve_box(i, box, size, names) for i, box in enumerate(layout["boxes"], 1)]}


def _resolve_box(number: int, box: Any, size: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(box, dict) or "label" not in box or not _numbers(box.get("box"), 4):
        raise UserError(f'box {number} must be {{"label": …, "box": [left, top, right, bottom]}}')
    label = box["label"]
    which = f'box {number} ("{label}")'
    left, top, right, bottom = box["box"]
    if min(left, top) < 0 or right > size[0] or bottom > size[1]:
        inside = "[0, 1]" if list(size) == [1, 1] else f"the {size[0]} × {size[1]} pixels"
        hint = '; for pixels give "size": [width, height]' if list(size) == [1, 1] and max(box["box"]) > 1 else ""
        raise UserError(f"{which} reaches outside {inside}: {box['box']}{hint}")
    if left >= right or top >= bottom:
        raise UserError(f"{which} is empty: {box['box']} must be left, top, right, bottom")
    position = [left / size[0], top / size[1], right / size[0], bottom / size[1]]
    index = _class_number(which, label, names)
    name = box.get("name", names[index] if index < len(names) else str(index))
    return {"label": index, "name": str(name), "box": position}


def _class_number(which: str, label: Any, names: Sequence[str]) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        if label < 0:
            raise UserError(f"{which}: classes are counted from 0")
        return label
    if not isinstance(label, str):
        raise UserError(f"{which}: a label is a class's name, or its number")
    if not names:
        raise UserError(f"{which}: the names of this model's classes are not known; give --labels FILE, or numbers")
    wanted = label.strip().lower()
    for index, name in enumerate(names):
        if name.lower() == wanted:
            return index
    close = did_you_mean(wanted.capitalize(), names) or did_you_mean(label, names)
    raise UserError(f"{which}: no class is called so{close}; there are {len(names)} names")


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, (int, float)) and not isinstance(each, bool) and abs(each) < 1e9 for each in value)
    )
