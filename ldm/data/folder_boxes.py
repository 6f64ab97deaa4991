"""Labelled boxes beside the images of a folder, from JSON files, text files as of YOLO, or a column of a table.

JSON has the form that `ldm.io.layouts` describes, or is a list of boxes. A text file has one box a line: the number of
its class, and the fractions of its centre, width and height.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.companions import BOXES_KEY, COLUMN, expand
from ldm.data.row_labels import ClassLookup, found_names, known_classes
from ldm.data.rows import Rows, in_threads
from ldm.errors import UserError
from ldm.io.layouts import resolve
from ldm.io.text import read_text

BOX_FILES = (".json", ".txt")


def add_boxes(rows: Rows, source: str, class_names: str | Sequence[str] | None) -> list[str]:
    """Add the entry `boxes` to rows, and return the names of the classes, which may be empty.

    The entry is a pair: boxes (n, 4), fractions (x, y, width, height), and labels (n,). Rows without boxes, or with
    boxes that are not valid, are left out.

    Args:
        rows: the images.
        source: a pattern, or a column with boxes or with paths.
        class_names: a list or a text file; None means the sorted names that occur, or numbers without names.

    Raises:
        UserError: there is no such column, or no image has valid boxes.
    """
    if source.startswith(COLUMN):
        values = rows.column(source.removeprefix(COLUMN), f"beside.{BOXES_KEY}")
        where = f'in the column "{source.removeprefix(COLUMN)}"'
    else:
        values = [expand(source, file) for file in rows.files]
        where = f'in a file "{source}"'
    layouts = in_threads(lambda value: _read(rows.root, value), values, "reading boxes")
    rows.entries[BOXES_KEY] = layouts
    rows.leave_out(
        [i for i, layout in enumerate(layouts) if layout is None], f"have no boxes {where}", f"check beside.{BOXES_KEY}"
    )
    present: list[dict[str, Any] | str] = rows.entries[BOXES_KEY]
    lookup = _lookup([layout for layout in present if not isinstance(layout, str)], class_names)
    rows.entries[BOXES_KEY] = [layout if isinstance(layout, str) else _resolved(layout, lookup) for layout in present]
    wrong = [i for i, boxes in enumerate(rows.entries[BOXES_KEY]) if isinstance(boxes, str)]
    first = next((rows.entries[BOXES_KEY][i] for i in wrong), "")
    rows.leave_out(wrong, f"have boxes that are not valid (the first: {first})", f"check beside.{BOXES_KEY}")
    return [] if lookup is None else lookup.names


def _read(root: Path, value: Any) -> dict[str, Any] | str | None:
    """Return a layout from a path, JSON text or the value of a table; a text if it is damaged, None if it is absent."""
    if isinstance(value, str) and value.strip()[:1] not in ("{", "["):
        path = root / value
        if not path.is_file():
            return None
        try:
            text = read_text(path, "file of boxes")
        except UserError as error:
            return str(error)
        return _parsed(text) if path.suffix.lower() != ".txt" else {"boxes": [_yolo(line) for line in _lines(text)]}
    return _parsed(value) if isinstance(value, str) else _layout(value)


def _parsed(text: str) -> dict[str, Any] | str:
    """Return a layout from JSON, or a text that says what is wrong."""
    try:
        layout = _layout(json.loads(text))
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    return layout or 'not a list of boxes, and without the key "boxes"'


def _layout(value: Any) -> dict[str, Any] | None:
    if isinstance(value, list):
        return {"boxes": value}
    return dict(value) if isinstance(value, Mapping) and isinstance(value.get("boxes"), list) else None


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _yolo(line: str) -> dict[str, Any]:
    """Return a box from a line with its class, centre, width and height."""
    try:
        label, x, y, width, height = line.split()[:5]
        left, top, w, h = float(x) - float(width) / 2, float(y) - float(height) / 2, float(width), float(height)
        edges = [min(max(edge, 0.0), 1.0) for edge in (left, top, left + w, top + h)]
        return {"label": int(label), "box": edges}
    except ValueError:
        return {"line": line}


def _lookup(layouts: Sequence[dict[str, Any]], class_names: str | Sequence[str] | None) -> ClassLookup | None:
    """Return the classes, or None if all labels are numbers without names."""
    if class_names is not None:
        return ClassLookup(known_classes(class_names))
    boxes = [box for layout in layouts for box in layout["boxes"] if isinstance(box, Mapping)]
    labels = {box["label"] for box in boxes if isinstance(box.get("label"), str | int)}
    if all(isinstance(label, int) for label in labels):
        return None
    return ClassLookup(found_names(labels))


def _resolved(layout: dict[str, Any], lookup: ClassLookup | None) -> tuple[np.ndarray, np.ndarray] | str:
    """Return boxes and labels, or text that says what is wrong."""
    boxes = []
    for box in layout["boxes"]:
        if lookup is not None and isinstance(box, Mapping) and isinstance(box.get("label"), str | int):
            label = lookup.label(box["label"])
            if label is None:
                return f'there is no class "{box["label"]}"'
            box = {**box, "label": label}
        boxes.append(dict(box) if isinstance(box, Mapping) else box)
    if not boxes:
        return np.zeros((0, 4)), np.zeros(0, np.int64)
    try:
        found = resolve({**layout, "boxes": boxes}, [])["boxes"]
    except UserError as error:
        return str(error)
    corners = np.array([box["box"] for box in found])
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1), np.array([b["label"] for b in found])
