"""Data sets of your own images: a folder, a list or a table, with captions, classes, masks, label maps and boxes.

Shapes: images (S, S, 3) float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ldm.data.companions import (
    BOXES_KEY,
    COLUMN,
    Companion,
    LabelMap,
    Mask,
    SmallImage,
    add_paths,
    check_first,
    check_sources,
    expand,
    leave_companions_out,
)
from ldm.data.folder_boxes import add_boxes
from ldm.data.image_files import ARRAY_SUFFIX, ImageFiles, pil_method, read_pixels, to_image
from ldm.data.layout_tokens import LayoutTokenBuilder
from ldm.data.row_captions import FROM_NAME, FROM_TEXT_FILE, add_captions, caption_file
from ldm.data.row_labels import FROM_FOLDER, add_labels, known_classes
from ldm.data.rows import Rows, find_rows
from ldm.data.unreadable import check_limit, check_share, find_faults
from ldm.data.windows import Window, find_window
from ldm.errors import UserError, did_you_mean
from ldm.io.images import open_image
from ldm.models.diffusion.batch_keys import LAYOUT_KEY, LOW_RESOLUTION_KEY, MASK_KEY, SEGMENTATION_KEY

CROPS = ("random", "center")
OVERSAMPLING = 2  # a JPEG is decoded at a reduced size, as long as its sides are this many times larger than the image


class Folder(ImageFiles):
    """Base class of the data sets of your own images: square images with what is known about them.

    Images of any format, mode and size are read: transparent parts become white, 16 bits are scaled to 8, and the
    rotation in the metadata is applied. The smaller side is resized to `size`, and the other one cropped. Rows of a
    list or a table that lack something are left out, and one log line says how many and names the first.

    Items: `image`, `file_path_`, `relative_file_path_`, and where asked for
        `caption`: a text;
        `class_label`, `human_label`: the number of a class, and its name;
        `mask` (S, S, 1), 1 in the masked part and -1 elsewhere, and `masked_image` with black in the masked part;
        `segmentation` (S, S, n_labels): 1 in the channel of the label;
        `coordinates_bbox`: tokens of the boxes, see `LayoutTokenBuilder`;
        `LR_image` (S / downscale_f, …, 3).

    Args:
        data_root: the folder of the images (default: the folder of `files`).
        files: a text file with one path a line, or a table (.csv, .tsv, .jsonl, .parquet) with the column `path` or
            `file_name`. Paths are relative to `data_root`. Without it, all images below `data_root` are used, or if a
            column is named, those in `metadata.jsonl`, `metadata.csv` or `metadata.parquet` there.
        size: S, side of the image in pixels.
        crop: "random" or "center"; position of the crop along the larger side.
        flip_p: probability of mirroring an image. PyTorch's global generator determines it and the crop.
        interpolation: name of the resampling filter of Pillow that resizes the images.
        caption: "txt" (a text file with the name of the image), "name" (the words of the file name), or a column.
        label: "folder" (the name of the folder of the image), or a column.
        class_names: names of the classes, a list or a text file (default: the sorted names that occur).
        beside: key → source of what lies beside each image, for the keys `mask`, `segmentation`, `boxes` and
            `LR_image`. A source is a pattern, such as "{stem}_mask.png", "maps/{stem}.png" or "../boxes/{path}.json",
            or a column, "column:NAME". {stem} and {name} are the name of the image without and with its suffix;
            {folder} and {path} are its folder and its path without suffix. Patterns start from the folder of the
            image, those with {folder} or {path} from `data_root`.
        n_labels, palette: number of labels of label maps (default: that of the classes), and the file with their
            colours; see `ldm.io.label_maps`.
        max_boxes, vocab_size: see `LayoutTokenBuilder`.
        downscale_f: `size` divided by that of `LR_image` (default: as the first pair).
        max_unreadable: largest share of the files that may be missing or unreadable; None skips the check.

    Attributes:
        class_names: names of the classes; empty without classes, or if they are numbers.

    Raises:
        UserError: there are no images, more are unreadable than allowed, or a parameter is invalid.
    """

    default_crop: ClassVar[str] = "center"
    default_flip_p: ClassVar[float] = 0.0

    def __init__(
        self,
        data_root: str | None = None,
        files: str | None = None,
        size: int = 256,
        crop: str | None = None,
        flip_p: float | None = None,
        interpolation: str = "bicubic",
        caption: str | None = None,
        label: str | None = None,
        class_names: str | Sequence[str] | None = None,
        beside: Mapping[str, str] | None = None,
        n_labels: int | None = None,
        palette: str | None = None,
        max_boxes: int = 30,
        vocab_size: int = 8192,
        downscale_f: int | None = None,
        max_unreadable: float | None = 0.01,
    ) -> None:
        name, beside = type(self).__name__, dict(beside or {})
        self.size, self.max_unreadable = size, max_unreadable
        self.crop = self.default_crop if crop is None else crop
        self.flip_p = self.default_flip_p if flip_p is None else flip_p
        self.method = pil_method(interpolation)
        _check_values(name, size, self.crop, self.flip_p, max_unreadable)
        check_sources(beside, name)
        rows = _find(name, data_root, files, caption, label, beside)
        self.class_names = _add_entries(rows, caption, label, class_names, beside)
        self.companions = self._companions(rows, beside, n_labels, palette, downscale_f)
        self.box_tokens = self._box_tokens(rows, max_boxes, vocab_size) if BOXES_KEY in beside else None
        if files is not None or rows.table is not None:
            rows.remove_duplicates()
        _leave_unreadable_out(rows, self.companions, max_unreadable)
        self.companion_paths = [rows.entries.pop(companion.key) for companion in self.companions]
        self.boxes = rows.entries.pop(BOXES_KEY, None)
        super().__init__(rows.paths, {"relative_file_path_": rows.files, **rows.entries})
        self.unreadable.add_checked(())

    def _companions(
        self, rows: Rows, beside: Mapping[str, str], n_labels: int | None, palette: str | None, downscale_f: int | None
    ) -> list[Companion]:
        """Find the files beside the images, and return the objects that read them."""
        kinds: tuple[type[Companion], ...] = (Mask, LabelMap, SmallImage)
        for kind in kinds:
            if kind.key in beside:
                add_paths(rows, kind.key, beside[kind.key], kind.noun)
        found: list[Companion] = []
        if MASK_KEY in beside:
            found.append(Mask())
        if SEGMENTATION_KEY in beside:
            count = n_labels or len(self.class_names)
            if not count:
                raise UserError(f"{rows.name}: label maps need n_labels, the number of labels, or class_names")
            found.append(LabelMap(count, palette))
        if LOW_RESOLUTION_KEY in beside:
            found.append(SmallImage(downscale_f or _factor(rows, self.size)))
        for companion in found:
            check_first(companion, rows)
        return found

    def _box_tokens(self, rows: Rows, max_boxes: int, vocab_size: int) -> LayoutTokenBuilder:
        """Return the builder of the tokens of the boxes."""
        highest = max((int(labels.max(initial=0)) for _, labels in rows.entries[BOXES_KEY]), default=0)
        return LayoutTokenBuilder(len(self.class_names) or highest + 1, max_boxes, vocab_size)

    def read(self, index: int) -> tuple[Image.Image, list[Image.Image]]:
        """Read an image and the files beside it.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        path = self.paths[index]
        if path.suffix.lower() == ARRAY_SUFFIX:
            image = Image.fromarray(read_pixels(path))
        else:
            image = open_image(path, min_side=OVERSAMPLING * self.size)
        contents = [
            companion.read_matching(paths[index], image.size)
            for companion, paths in zip(self.companions, self.companion_paths, strict=True)
        ]
        return image, contents

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, (image, contents) = self.readable(index)
        width, height = image.size
        window = find_window(width, height, self.size, self.crop == "random", self.flip_p)
        item = self.entries(index)
        item["image"] = to_image(np.asarray(window.view(image, self.size, self.method)))
        for companion, content in zip(self.companions, contents, strict=True):
            item |= companion.entries(content, window, item["image"])
        if self.box_tokens is not None:
            item[LAYOUT_KEY] = self._tokens(index, window)
        return item

    def _tokens(self, index: int, window: Window) -> Any:
        assert self.box_tokens is not None and self.boxes is not None
        boxes, labels = self.boxes[index]
        crop = (window.left, window.top, window.right - window.left, window.bottom - window.top)
        return self.box_tokens.encode(boxes, labels, crop, window.flip)


class FolderTrain(Folder):
    """Your own images for training: crops at random positions, mirrored half of the time."""

    default_crop, default_flip_p = "random", 0.5


class FolderValidation(Folder):
    """Your own images for validation: central crops."""


def _check_values(name: str, size: int, crop: str, flip_p: float, max_unreadable: float | None) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"{name}: size must be an integer of at least 1, not {size!r}")
    if crop not in CROPS:
        raise UserError(f'{name}: there is no crop "{crop}"{did_you_mean(crop, CROPS)}; choose {" or ".join(CROPS)}')
    if not isinstance(flip_p, int | float) or not 0 <= flip_p <= 1:
        raise UserError(f"{name}: flip_p is a probability from 0 to 1, not {flip_p}")
    check_limit(max_unreadable, name)


def _find(
    name: str,
    data_root: str | None,
    files: str | None,
    caption: str | None,
    label: str | None,
    beside: Mapping[str, str],
) -> Rows:
    """Return the images of the data set without the files beside them."""
    columns = [
        *([caption] if caption not in (None, FROM_TEXT_FILE, FROM_NAME) else []),
        *([label] if label not in (None, FROM_FOLDER) else []),
        *(source for source in beside.values() if source.startswith(COLUMN)),
    ]
    rows = find_rows(name, data_root, files, needs_table=bool(columns))
    if rows.table is None and files is None:
        patterns = [source for source in beside.values() if not source.startswith(COLUMN)]
        leave_companions_out(rows, patterns)
        if not len(rows):
            raise UserError(f'{name}: all images of "{rows.listed}" are files that beside names; check its patterns')
        used = [expand(pattern, file) for pattern in patterns for file in rows.files] if rows.others else []
        used += [caption_file(file) for file in rows.files] if caption == FROM_TEXT_FILE else []
        rows.log_others(used)
    return rows


def _add_entries(
    rows: Rows,
    caption: str | None,
    label: str | None,
    class_names: str | Sequence[str] | None,
    beside: Mapping[str, str],
) -> list[str]:
    """Add captions, labels and boxes to rows, and return the names of the classes."""
    if label is not None and BOXES_KEY in beside and class_names is None:
        raise UserError(f"{rows.name}: label and boxes share their classes; list them in class_names")
    if caption is not None:
        add_captions(rows, caption)
    names = [] if class_names is None else [each[0] for each in known_classes(class_names)]
    if label is not None:
        names = add_labels(rows, label, class_names)
    if BOXES_KEY in beside:
        names = add_boxes(rows, beside[BOXES_KEY], class_names)
    return names


def _leave_unreadable_out(rows: Rows, companions: Sequence[Companion], max_unreadable: float | None) -> None:
    """Remove the images that cannot be read, or whose files beside them cannot be read.

    Raises:
        UserError: their share is larger than `max_unreadable`.
    """
    if max_unreadable is None:
        return
    faults: dict[int, str] = {}
    for companion in companions:
        faults |= find_faults(rows.entries[companion.key], companion.read)
    faults |= find_faults(rows.paths, read_pixels)
    check_share(faults, rows.files, max_unreadable, rows.name)
    if faults:
        rows.keep(index for index in range(len(rows)) if index not in faults)


def _factor(rows: Rows, size: int) -> int:
    """Return the factor between the first image and its version of lower resolution.

    Raises:
        UserError: no pair can be read, or the size is not divisible by the factor.
    """
    for path, small in zip(rows.paths, rows.entries[LOW_RESOLUTION_KEY], strict=True):
        try:
            (height, width), small_size = read_pixels(path).shape[:2], open_image(small).size
        except UserError:
            continue
        factor = round(min(height, width) / min(small_size))
        if factor < 1 or size % factor:
            raise UserError(
                f'{rows.name}: the image "{path}" is {factor} times as large as "{small}", and size ({size}) is not '
                "divisible by that; choose another size, or set downscale_f"
            )
        return factor
    raise UserError(f"{rows.name}: no pair of images can be read; check data_root and beside.{LOW_RESOLUTION_KEY}")
