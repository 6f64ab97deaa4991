"""Boxes of OpenImages (arXiv:1811.00982) in the CSV and JSON files of its web site.

| file | content |
|---|---|
| `class-descriptions-boxable.csv` | id and name of each class |
| `train-annotations-bbox.csv` (or `oidv6-train-annotations-bbox.csv`), `validation-…`, `test-…` | boxes |
| `bbox_labels_600_hierarchy.json` | classes below other classes, optional |
| `train/`, `validation/`, `test/` (also below `images/`) | images, named by their ids, at any depth |

The 14.6 million training boxes take one or two minutes to read. The arrays are then kept in `~/.cache/ldm/boxes`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.config.assets import locate
from ldm.data.boxed_images import AnnotatedImages, BoxLimits
from ldm.data.boxes import BoxTable
from ldm.data.faults import Faults
from ldm.data.object_classes import TopClasses, choose_classes, merged_ids
from ldm.errors import UserError, did_you_mean
from ldm.io.files import atomic_path
from ldm.io.folders import list_files_below
from ldm.io.image_formats import image_suffixes
from ldm.io.text import read_lines, read_text
from ldm.modules.encoders.layout import ATTRIBUTES

logger = logging.getLogger(__name__)

REQUIRED = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")
# Columns of the attributes in the order of their bits. The value -1 means "unknown".
ATTRIBUTE_COLUMNS = dict(zip(ATTRIBUTES, ("IsGroupOf", "IsOccluded", "IsDepiction", "IsInside"), strict=True))
CLASS_FILES = ("class-descriptions-boxable.csv", "oidv7-class-descriptions-boxable.csv")
BOX_FILES = ("oidv6-{split}-annotations-bbox.csv", "{split}-annotations-bbox.csv")
IMAGE_FOLDERS = ("{split}", "images/{split}", "images")
HIERARCHY_FILE = "bbox_labels_600_hierarchy.json"
CACHED_FROM = 20_000_000  # bytes; smaller files are read in two seconds
CACHE_VERSION = 1
PROGRESS_ROWS = 100_000
ID_LENGTH = 16  # of an image; shorter ids are padded with zeros


@dataclass(frozen=True)
class AnnotatedBoxes:
    """Boxes of a file: a table whose labels are indices in `class_ids`, and what was wrong in the file."""

    table: BoxTable
    class_ids: list[str]
    faults: Faults

    def counts(self) -> dict[str, int]:
        """Return the number of boxes of each class by its id."""
        counts = np.bincount(self.table.labels, minlength=len(self.class_ids)).tolist()
        return dict(zip(self.class_ids, counts, strict=True))


@dataclass(frozen=True)
class OpenImagesFiles:
    """Files of a split of OpenImages in a folder.

    Attributes:
        folder: the folder.
        split: "train", "validation" or "test".
    """

    folder: Path
    split: str

    def classes(self) -> dict[str, str]:
        """Return the name of each class by its id."""
        return read_classes(find_file(self.folder, CLASS_FILES, "list of classes"))

    def paths(self) -> dict[str, Path]:
        """Return the files of the split by the published names of their roles.

        Raises:
            UserError: one is missing.
        """
        return {
            "top_level": self.folder,
            "class_descriptions": find_file(self.folder, CLASS_FILES, "list of classes"),
            "annotations": find_file(self.folder, BOX_FILES, "list of boxes", self.split),
            "files": find_file(self.folder, IMAGE_FOLDERS, "folder of images", self.split),
        }

    def boxes(self, split: str | None = None) -> AnnotatedBoxes:
        """Return the boxes of a split, by default that of this object."""
        return read_boxes(find_file(self.folder, BOX_FILES, "list of boxes", split or self.split))

    def mapping(self, merge_into: Sequence[str], hierarchy: str | None) -> dict[str, str]:
        """Return the id of the class that each class below `merge_into` is merged into; see `merged_ids`."""
        if not merge_into:
            return {}
        path = locate(hierarchy) if hierarchy else find_file(self.folder, (HIERARCHY_FILE,), "label hierarchy")
        source = find_file(self.folder, CLASS_FILES, "list of classes")
        return merged_ids(read_hierarchy(path), ids_of_names(merge_into, self.classes(), source))

    def images(
        self, selection: list[str] | TopClasses | None, mapping: Mapping[str, str], limits: BoxLimits
    ) -> AnnotatedImages:
        """Return the images of the split with the boxes of the selected classes.

        Args:
            selection: names of classes, None for all; the most frequent ones are counted in the training boxes.
            mapping: id of a class → id of the class that it is merged into.
            limits: limits of the boxes.

        Raises:
            UserError: a file is missing or damaged, a class is unknown, or no image is left.
        """
        boxes, known = self.boxes(), self.classes()
        files = self.paths()
        source, folder = str(files["annotations"]), files["files"]
        if isinstance(selection, TopClasses):
            counts = (boxes if self.split == "train" else self.boxes("train")).counts()
            named = {name: counts.get(class_id, 0) for class_id, name in known.items()}
            selection = [name for name, _ in selection.choose(named)]
        classes = choose_classes(known, selection, mapping, source)
        self._count_unknown(boxes, known)
        numbers = classes.numbers(boxes.class_ids, mapping)
        table = limits.apply(boxes.table.relabelled(numbers).without_duplicates())
        listing = list_files_below(folder, image_suffixes())
        paths = {os.path.splitext(os.path.basename(name))[0]: folder / name for name in listing.files}

        def path_of(image: str) -> Path | None:
            return paths.get(image) or paths.get(image.rjust(ID_LENGTH, "0"))

        return AnnotatedImages.existing(table, path_of, classes, source)

    @staticmethod
    def _count_unknown(boxes: AnnotatedBoxes, known: Mapping[str, str]) -> None:
        """Log the faults of the boxes in one line, classes without a name among them."""
        unknown = {class_id: count for class_id, count in boxes.counts().items() if class_id not in known}
        boxes.faults.add("boxes of unknown classes", unknown, sum(unknown.values()))
        boxes.faults.log()


def find_file(folder: Path, names: tuple[str, ...], noun: str, split: str = "train") -> Path:
    """Return the first of the files or folders `names` that exists in a folder.

    Raises:
        UserError: none exists.
    """
    candidates = [folder / name.format(split=split) for name in names]
    found = next((path for path in candidates if path.exists()), None)
    if found is None:
        raise UserError(f'there is no {noun} "{candidates[-1]}" of OpenImages; put it there, or set data_path')
    return found


def read_classes(path: Path) -> dict[str, str]:
    """Return the name of each class by its id, from a file such as `class-descriptions-boxable.csv`.

    Raises:
        UserError: the file is missing, or has another form.
    """
    rows = list(csv.reader(read_lines(path, "list of classes", "give class-descriptions-boxable.csv")))
    rows = [row for row in rows if row and row[0] != "LabelName"]
    if not rows or any(len(row) != 2 for row in rows):
        raise UserError(f'the list of classes "{path}" must have lines such as "/m/011k07,Tortoise"')
    return {class_id.strip(): name.strip() for class_id, name in rows}


def read_image_names(path: Path) -> list[str]:
    """Return the values of the column `image_name` of a CSV file, such as `train-images-boxable.csv`.

    Raises:
        UserError: the file is missing, or lacks the column.
    """
    rows = list(csv.reader(read_lines(path, "list of images", "give train-images-boxable.csv")))
    if not rows or "image_name" not in rows[0]:
        raise UserError(f'the list of images "{path}" has no column image_name; give train-images-boxable.csv')
    column = rows[0].index("image_name")
    return [row[column] for row in rows[1:] if len(row) > column]


def read_hierarchy(path: Path) -> dict[str, str]:
    """Return the id of the class above each class, from a file such as `bbox_labels_600_hierarchy.json`.

    A class with several classes above it has the first one. Parts of an object, such as a wheel of a car, are left out.

    Raises:
        UserError: the file is missing, or is not a hierarchy.
    """
    try:
        root = json.loads(read_text(path, "label hierarchy", "give bbox_labels_600_hierarchy.json"))
        return dict(reversed(list(_pairs(root))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'"{path}" is not a label hierarchy; give bbox_labels_600_hierarchy.json') from None


def _pairs(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for child in node.get("Subcategory", ()):
        yield child["LabelName"], node["LabelName"]
        yield from _pairs(child)


def ids_of_names(names: Sequence[str], classes: Mapping[str, str], source: Path) -> list[str]:
    """Return the ids of classes by their names.

    Raises:
        UserError: a name is unknown.
    """
    ids = {name: class_id for class_id, name in classes.items()}
    for name in names:
        if name not in ids:
            raise UserError(f'"{source}" has no class "{name}"{did_you_mean(name, list(ids))}')
    return [ids[name] for name in names]


def read_boxes(path: Path) -> AnnotatedBoxes:
    """Return the boxes of a CSV file of OpenImages. Large files are read once, and then come from a cache.

    Boxes that are empty or outside their image, and rows that cannot be read, are counted and left out.

    Raises:
        UserError: the file is missing, is not CSV, or lacks a column.
    """
    try:
        status = path.stat()
    except OSError:
        raise UserError(f'there is no list of boxes "{path}"; download it from the site of OpenImages') from None
    cache = _cache_path(path, status) if status.st_size >= CACHED_FROM else None
    if cache is not None and cache.exists():
        found = _load(cache, path)
        if found is not None:
            return found
    found = _parse(path, status.st_size)
    if cache is not None:
        _save(cache, found)
    return found


def _parse(path: Path, size: int) -> AnnotatedBoxes:
    images: dict[str, int] = {}
    classes: dict[str, int] = {}
    bits: dict[tuple[str, ...], int] = {}
    image_of_box, labels, attributes, ids, corners = array("i"), array("i"), array("B"), array("q"), array("d")
    faults = Faults(str(path))
    for number, image, label, flags, position in _rows(path, size, faults):
        image_of_box.append(images.setdefault(image, len(images)))
        labels.append(classes.setdefault(label, len(classes)))
        if flags not in bits:
            bits[flags] = sum(1 << bit for bit, flag in enumerate(flags) if flag == "1")
        attributes.append(bits[flags])
        ids.append(number)
        corners.extend(position)
    values = np.array(corners, np.float64).reshape(-1, 4)  # XMin, XMax, YMin, YMax
    boxes = np.stack([values[:, 0], values[:, 2], values[:, 1] - values[:, 0], values[:, 3] - values[:, 2]], axis=1)
    table = BoxTable.grouped(
        list(images),
        np.array(image_of_box, np.int32),
        boxes,
        np.array(labels, np.int32),
        np.array(attributes, np.uint8),
        np.array(ids, np.int64),
    )
    return AnnotatedBoxes(table.checked(faults, "row"), list(classes), faults)


def _rows(
    path: Path, size: int, faults: Faults
) -> Iterator[tuple[int, str, str, tuple[str, ...], tuple[float, float, float, float]]]:
    """Yield (number of the row, image, class, attributes, (XMin, XMax, YMin, YMax)) of each row of a file."""
    with (
        open(path, "rb") as binary,
        io.TextIOWrapper(binary, newline="", encoding="utf-8-sig", errors="replace") as file,
        tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, delay=2.0, leave=False) as progress,
    ):
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            required, flags = _columns(path, header)
            for number, row in enumerate(reader, 1):
                if number % PROGRESS_ROWS == 0:
                    progress.update(binary.tell() - progress.n)
                try:
                    image, label, x0, x1, y0, y1 = required(row)
                    yield number, image, label, flags(row), (float(x0), float(x1), float(y0), float(y1))
                except (IndexError, ValueError):
                    if row:
                        faults.add("rows that cannot be read", [f"row {number}"])
        except csv.Error as error:
            raise UserError(f'cannot read the boxes in "{path}": {error}; download the file again') from None


def _columns(path: Path, header: list[str]) -> tuple[Any, Any]:
    """Return functions that select the required columns, and the attributes, of a row."""
    for name in REQUIRED:
        if name not in header:
            raise UserError(f'the list of boxes "{path}" has no column {name}{did_you_mean(name, header)}')
    indices = [header.index(name) if name in header else None for name in ATTRIBUTE_COLUMNS.values()]
    required = itemgetter(*map(header.index, REQUIRED))
    if None not in indices:
        return required, itemgetter(*indices)
    return required, lambda row: tuple("" if index is None else row[index] for index in indices)


def _cache_path(path: Path, status: os.stat_result) -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {CACHE_VERSION}"
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    return (Path(root) if root else Path.home() / ".cache") / "ldm" / "boxes" / name


def _save(cache: Path, found: AnnotatedBoxes) -> None:
    """Write the arrays to the cache; a cache that cannot be written is only slower."""
    faults = json.dumps([found.faults.counts, found.faults.examples])
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, class_ids=np.array(found.class_ids, str), faults=np.array(faults), **vars(found.table))
        logger.info('keeping the boxes in "%s"', cache)
    except (OSError, UserError) as error:
        logger.info('cannot keep the boxes in "%s": %s', cache, error)


def _load(cache: Path, path: Path) -> AnnotatedBoxes | None:
    """Return the boxes in a cache, None if it is damaged."""
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            faults = Faults(str(path))
            counts, examples = json.loads(str(arrays["faults"]))
            for kind, count in counts.items():
                faults.add(kind, examples[kind], count)
            names = ("images", "starts", "boxes", "labels", "attributes", "ids")
            return AnnotatedBoxes(BoxTable(*(arrays[name] for name in names)), arrays["class_ids"].tolist(), faults)
    except Exception:  # zip files raise many types of errors
        logger.info('the cache "%s" is damaged; reading "%s" again', cache, path)
        return None
