"""Files beside the images of a folder: masks, label maps and images of lower resolution.

A source is a pattern of file names, such as "{stem}_mask.png", or a column of a table, "column:mask". Patterns start
from the folder of the image; those with {path} or {folder} start from the folder of the data set.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ldm.config.assets import locate
from ldm.data.image_files import to_image
from ldm.data.inpainting import masked
from ldm.data.rows import Rows, in_threads
from ldm.data.unreadable import SharedFlags, logger
from ldm.data.windows import Window
from ldm.errors import UserError, did_you_mean
from ldm.io.images import as_rgb, decode_image
from ldm.io.label_maps import read_label_map, read_palette
from ldm.models.diffusion.batch_keys import LOW_RESOLUTION_KEY, MASK_KEY, MASKED_KEY, SEGMENTATION_KEY
from ldm.pipelines.inputs import as_mask

COLUMN = "column:"
PROBES = 5  # files that are read at the start
PLACEHOLDERS = ("stem", "name", "path", "folder")
BOXES_KEY = "boxes"
KEYS = (MASK_KEY, SEGMENTATION_KEY, BOXES_KEY, LOW_RESOLUTION_KEY)


class Companion(ABC):
    """Image file beside each image, which shows the same scene at any resolution.

    Attributes:
        key: its key in `beside`.
        noun: its name in messages.
    """

    key: ClassVar[str]
    noun: ClassVar[str]

    @abstractmethod
    def read(self, path: Path) -> Image.Image:
        """Read a file.

        Raises:
            UserError: the file is missing or cannot be read.
        """

    @abstractmethod
    def entries(self, content: Image.Image, window: Window, image: np.ndarray) -> dict[str, Any]:
        """Return the entries of an item.

        Args:
            content: what `read` returned.
            window: the part that the item shows.
            image: the entry `image`, (S, S, 3) float32.
        """

    def read_matching(self, path: Path, size: tuple[int, int]) -> Image.Image:
        """Read a file that has the proportions of an image with the size (width, height).

        Raises:
            UserError: the file cannot be read, or has other proportions.
        """
        content = self.read(path)
        width, height = content.size
        if abs(width - size[0] * height / size[1]) > 1.5 + 0.02 * width:
            raise UserError(
                f'the {self.noun} "{path}" ({width} × {height} pixels) has other proportions than its image '
                f"({size[0]} × {size[1]}); replace it"
            )
        return content


class Mask(Companion):
    """Mask beside each image, white in the masked part.

    Entries: `mask` (S, S, 1) float32, 1 in the masked part and -1 elsewhere; `masked_image`, the image with black in
    the masked part.
    """

    key, noun = MASK_KEY, "mask"

    def read(self, path: Path) -> Image.Image:
        """See `Companion`."""
        return Image.fromarray(as_mask(decode_image(path, self.noun)).astype(np.uint8) * 255)

    def entries(self, content: Image.Image, window: Window, image: np.ndarray) -> dict[str, Any]:
        """See `Companion`."""
        view = np.asarray(window.view(content, len(image), Image.Resampling.BILINEAR))
        mask = np.where(view >= 128, np.float32(1.0), np.float32(-1.0))[..., None]
        return {MASK_KEY: mask, MASKED_KEY: masked(image, mask)}


class LabelMap(Companion):
    """Label map beside each image.

    Entries: `segmentation` (S, S, n_labels) float32, 1 in the channel of the label; 0 in all channels for a label that
    is not below `n_labels`, such as 255 for "no label".

    Args:
        n_labels: number of labels.
        palette: file with the label of each colour; see `ldm.io.label_maps`.
    """

    key, noun = SEGMENTATION_KEY, "label map"
    dtype: Any = np.float32

    def __init__(self, n_labels: int, palette: str | None = None) -> None:
        self.n_labels = n_labels
        self.palette = None if palette is None else read_palette(locate(palette))
        self._logged = SharedFlags(1)

    def labels(self, path: Path) -> np.ndarray:
        """Return the labels (H, W) int64 in a file; subclasses may number them differently."""
        return read_label_map(path, self.palette, "palette")

    def read(self, path: Path) -> Image.Image:
        """See `Companion`."""
        labels = self.labels(path)
        if labels.max(initial=0) >= self.n_labels and self._logged.set(0):
            logger.info(
                'the label map "%s" has the label %d, and n_labels is %d; such pixels have no label, in all maps',
                *(path, labels.max(), self.n_labels),
            )
        return Image.fromarray(np.minimum(labels, self.n_labels).astype(np.int32))

    def entries(self, content: Image.Image, window: Window, image: np.ndarray) -> dict[str, Any]:
        """See `Companion`."""
        labels = np.asarray(window.view(content, len(image), Image.Resampling.NEAREST))
        return {SEGMENTATION_KEY: self.one_hot(labels)}

    def one_hot(self, labels: np.ndarray) -> np.ndarray:
        """Return a map of labels (H, W), at most `n_labels`, with one channel a label."""
        return np.eye(self.n_labels + 1, self.n_labels, dtype=self.dtype)[labels]  # the last row is 0


class SmallImage(Companion):
    """Image of lower resolution beside each image.

    Entries: `LR_image` (S / downscale_f, …, 3) float32 in [-1, 1].

    Args:
        downscale_f: S divided by the side of the small image.
    """

    key, noun = LOW_RESOLUTION_KEY, "image of lower resolution"

    def __init__(self, downscale_f: int) -> None:
        self.downscale_f = downscale_f

    def read(self, path: Path) -> Image.Image:
        """See `Companion`."""
        image = decode_image(path, self.noun)
        try:
            return as_rgb(image)
        except ValueError as error:
            raise UserError(f'cannot read the {self.noun} "{path}": {error}') from None

    def entries(self, content: Image.Image, window: Window, image: np.ndarray) -> dict[str, Any]:
        """See `Companion`."""
        view = window.view(content, len(image) // self.downscale_f, Image.Resampling.BICUBIC)
        return {LOW_RESOLUTION_KEY: to_image(np.asarray(view))}


def check_sources(beside: Mapping[str, str], name: str) -> None:
    """Check the keys and the patterns of `beside`.

    Args:
        beside: entry → pattern or column.
        name: name of the data set in messages.

    Raises:
        UserError: a key or a placeholder is unknown, or a pattern is the same for all images.
    """
    for key, source in beside.items():
        if key not in KEYS:
            raise UserError(f'{name}: beside has no entry "{key}"{did_you_mean(key, KEYS)}; it has {", ".join(KEYS)}')
        if source.startswith(COLUMN):
            continue
        used = re.findall(r"\{(.*?)\}", source)
        for word in used:
            if word not in PLACEHOLDERS:
                known = ", ".join(f"{{{each}}}" for each in PLACEHOLDERS)
                raise UserError(f'{name}: the pattern "{source}" has an unknown {{{word}}}; choose from {known}')
        if not {"stem", "name", "path"} & {*used}:
            raise UserError(
                f'{name}: the pattern "{source}" names the same file for all images; use {{stem}} in it, or write '
                f'"{COLUMN}{source}" for a column of the table'
            )


def expand(pattern: str, file: str) -> str:
    """Return the path that a pattern names for an image, relative to the folder of the data set.

    Args:
        pattern: pattern with some of `PLACEHOLDERS`.
        file: relative path of the image.
    """
    path = PurePosixPath(file)
    values = {
        "stem": path.stem,
        "name": path.name,
        "path": str(path.with_suffix("")),
        "folder": str(path.parent),
    }
    expanded = re.sub(r"\{(\w+)\}", lambda match: values[match[1]], pattern)
    is_from_root = "{path}" in pattern or "{folder}" in pattern
    return os.path.normpath(expanded if is_from_root else path.parent / expanded)


def leave_companions_out(rows: Rows, patterns: list[str]) -> None:
    """Remove the images that are files beside other images from the images of a folder."""
    files = {os.path.normpath(file) for file in rows.files}
    beside = {expand(pattern, file) for pattern in patterns for file in rows.files} & files
    if beside:
        rows.keep(i for i, file in enumerate(rows.files) if os.path.normpath(file) not in beside)


def add_paths(rows: Rows, key: str, source: str, noun: str) -> None:
    """Add the paths of the files beside the images as the entry `key`; rows without such a file are left out.

    Raises:
        UserError: there is no such column, or no image has a file.
    """
    if source.startswith(COLUMN):
        values = rows.column(source.removeprefix(COLUMN), f"beside.{key}")
        paths = [rows.root / value if isinstance(value, str) and value.strip() else None for value in values]
        fault = f'have no {noun} in the column "{source.removeprefix(COLUMN)}"'
    else:
        paths = [rows.root / expand(source, file) for file in rows.files]
        fault = f'have no {noun} "{source}"'
    exist = in_threads(lambda path: path is not None and path.is_file(), paths, "finding files")
    rows.entries[key] = paths
    rows.leave_out([i for i, exists in enumerate(exist) if not exists], fault, f"check beside.{key}")


def check_first(companion: Companion, rows: Rows) -> None:
    """Read the first files of a kind, whose header may hide that none of them suits, such as label maps in colour.

    Raises:
        UserError: none of them can be read.
    """
    error = ""
    for path in rows.entries[companion.key][:PROBES]:
        try:
            companion.read(path)
            return
        except UserError as reason:
            error = error or str(reason)
    raise UserError(f"{rows.name}: beside.{companion.key}: {error}")
