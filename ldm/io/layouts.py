"""Read layouts of labelled boxes from JSON files, and class names from text files. Needs no torch.

A file holds one layout, or a list of layouts:

    {"boxes": [{"label": "Dog", "box": [left, top, right, bottom]}, ...]}

Positions are fractions of the width and height in [0, 1], or pixels if the layout has `"size": [width, height]`. A
label is the name of a class, or its number from 0.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError, did_you_mean
from ldm.io.text import read_lines, read_text

SHAPE = '{"boxes": [{"label": "Dog", "box": [left, top, right, bottom]}]}'


def read_layouts(path: Path) -> list[Any]:
    """Return the layouts in a file, unchecked; see `resolve`.

    Raises:
        UserError: The file is missing, is not JSON, or has no layout.
    """
    try:
        content = json.loads(read_text(path, "layout file", f"give JSON such as {SHAPE}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f'cannot read the layout file "{path}": {error}; give JSON such as {SHAPE}') from None
    layouts = content if isinstance(content, list) else [content]
    if not layouts:
        raise UserError(f'the layout file "{path}" is empty; give JSON such as {SHAPE}')
    return layouts


def read_labels(path: Path) -> list[str]:
    """Return class names in their order: the lines of a text file, or the last column of a CSV file.

    The list of OpenImages, class-descriptions-boxable.csv, has this format.

    Raises:
        UserError: The file is missing, is not text, or is empty.
    """
    lines = read_lines(path, "file of labels", "give UTF-8 text, one name a line")
    lines = [line.strip() for line in lines if line.strip()]
    if path.suffix.lower() == ".csv":
        try:
            lines = [row[-1].strip() for row in csv.reader(lines)]
        except csv.Error as error:
            raise UserError(f'cannot read the file of labels "{path}": {error}; give a CSV file') from None
    if not lines:
        raise UserError(f'the file of labels "{path}" is empty; write one name a line')
    return lines


def resolve(layout: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return a layout with numbers as labels and positions in [0, 1].

    Args:
        layout: a layout in the format of a file.
        names: class names; without them, labels must be numbers.

    Returns:
        A dict whose entry `boxes` is a list of dicts with `label`, `name` and `box`.

    Raises:
        UserError: The layout, or the box that the message names, is invalid.
    """
    if not isinstance(layout, dict) or not isinstance(layout.get("boxes"), list):
        raise UserError(f"a layout must have a list of boxes, as in {SHAPE}")
    for key in layout:
        if key not in ("boxes", "size"):
            raise UserError(f'unknown key "{key}"{did_you_mean(key, ("boxes", "size"))}; a layout has boxes and size')
    if not layout["boxes"]:
        raise UserError("the layout has no box; give at least one")
    size = layout.get("size", [1, 1])
    if not _is_list_of_numbers(size, 2) or min(size) <= 0:
        raise UserError(f'"size" must be [width, height] in pixels, not {json.dumps(size)}')
    return {"boxes": [_resolve_box(i, box, size, names) for i, box in enumerate(layout["boxes"], 1)]}


def _resolve_box(number: int, box: Any, size: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(box, dict) or "label" not in box or not _is_list_of_numbers(box.get("box"), 4):
        raise UserError(f'box {number} must be {{"label": …, "box": [left, top, right, bottom]}}')
    label = box["label"]
    described = f'box {number} ("{label}")'
    left, top, right, bottom = box["box"]
    if min(left, top) < 0 or right > size[0] or bottom > size[1]:
        inside = "[0, 1]" if list(size) == [1, 1] else f"the {size[0]} × {size[1]} pixels"
        hint = '; for pixels give "size": [width, height]' if list(size) == [1, 1] and max(box["box"]) > 1 else ""
        raise UserError(f"{described} extends outside {inside}: {box['box']}{hint}")
    if left >= right or top >= bottom:
        raise UserError(f"{described} is empty: {box['box']} must be [left, top, right, bottom]")
    position = [left / size[0], top / size[1], right / size[0], bottom / size[1]]
    index = _class_number(described, label, names)
    name = box.get("name", names[index] if index < len(names) else str(index))
    return {"label": index, "name": str(name), "box": position}


def _class_number(described: str, label: Any, names: Sequence[str]) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        if label < 0:
            raise UserError(f"{described}: class numbers start at 0")
        return label
    if not isinstance(label, str):
        raise UserError(f"{described}: a label must be the name or the number of a class")
    if not names:
        raise UserError(f"{described}: the model has no class names; give them (--labels FILE), or numbers")
    wanted = label.strip().lower()
    for index, name in enumerate(names):
        if name.lower() == wanted:
            return index
    close = did_you_mean(wanted.capitalize(), names) or did_you_mean(label, names)
    raise UserError(f"{described}: there is no such class{close}; there are {len(names)} names")


def _is_list_of_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(each, (int, float)) and not isinstance(each, bool) and abs(each) < 1e9 for each in value)
    )
