"""Data sets of images with labelled boxes, for layout to image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.boxes import BoxTable, Objects
from ldm.data.faults import Faults
from ldm.data.image_files import ImageFiles, to_image
from ldm.data.layout_tokens import LayoutTokenBuilder
from ldm.data.object_classes import ObjectClasses
from ldm.data.windows import Window, find_window
from ldm.errors import UserError, did_you_mean
from ldm.io.images import open_image
from ldm.models.diffusion.batch_keys import LAYOUT_KEY

logger = logging.getLogger(__name__)

METHOD = Image.Resampling.BICUBIC
OVERSAMPLING = 2  # a JPEG is decoded at a reduced size, as long as its sides are this many times larger than the image
CROP_METHODS = ("none", "center", "random-1d", "random-2d")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedImages:
    """Images with boxes: a table whose images are the names of `paths`, and whose labels are numbers of `classes`.

    Attributes:
        ids: identifier of each image in the files of the data set.
    """

    table: BoxTable
    paths: list[Path]
    ids: list[str]
    classes: ObjectClasses

    @classmethod
    def existing(
        cls, table: BoxTable, path_of: Callable[[str], Path | None], classes: ObjectClasses, source: str
    ) -> AnnotatedImages:
        """Return the images whose files exist; the others are counted in one log line.

        Args:
            table: table whose images are identifiers.
            path_of: function from an identifier to its file, None if there is none.
            classes: classes of the labels.
            source: name of the list in messages.

        Raises:
            UserError: no image is left.
        """
        found = [path_of(each) for each in table.images.tolist()]
        exists = np.array([path is not None for path in found], bool)
        faults = Faults(source)
        faults.add("images whose files are missing", table.images[~exists][:3].tolist(), int((~exists).sum()))
        faults.log()
        table = table.with_images(exists)
        if len(table) == 0:
            raise UserError(f'"{source}" names no image that exists and has enough boxes; check the images and limits')
        paths = [path for path in found if path is not None]
        return cls(table, paths, table.images.tolist(), classes)


@dataclass(frozen=True)
class BoxLimits:
    """Limits of the boxes that a data set uses.

    Attributes:
        min_area: boxes must be larger than this fraction of the image.
        least, most: smallest and largest number of such boxes in an image; other images are left out.
        groups: use boxes around groups of objects.
    """

    min_area: float = 0.0
    least: int = 1
    most: int = 30
    groups: bool = True

    def apply(self, table: BoxTable) -> BoxTable:
        """Return the table with the boxes and the images within the limits."""
        keep = table.areas > self.min_area
        if not self.groups:
            keep &= (table.attributes & 1) == 0
        return table.with_boxes(keep).with_counts(self.least, self.most)


def check_crop_method(crop_method: str) -> None:
    """Check the name of a crop method.

    Raises:
        UserError: the method is unknown.
    """
    if crop_method not in CROP_METHODS:
        hint = did_you_mean(str(crop_method), CROP_METHODS)
        raise UserError(f'there is no crop_method "{crop_method}"{hint}; choose one of {", ".join(CROP_METHODS)}')


def choose_window(width: int, height: int, size: int, crop_method: str, flip_p: float) -> Window:
    """Return the part of an image that an item shows. PyTorch's global generator determines random choices.

    Args:
        width, height: size of the image.
        size: side of the item in pixels.
        crop_method: "none" (the whole image, resized to a square), "center", "random-1d" (at a random position along
            the larger side), or "random-2d" (a square of random size and position, with at least `size` pixels a side
            if there are so many).
        flip_p: probability of mirroring.
    """
    if crop_method in ("center", "random-1d"):
        return find_window(width, height, size, crop_method == "random-1d", flip_p)
    flip = flip_p > 0 and bool(torch.rand(()) < flip_p)
    if crop_method == "none":
        return Window(0.0, 0.0, 1.0, 1.0, flip)
    largest = min(width, height)
    side = largest if largest <= size else int(torch.randint(size, largest + 1, ()))
    left, top = (int(torch.randint(length - side + 1, ())) for length in (width, height))
    return Window(left / width, top / height, (left + side) / width, (top + side) / height, flip)


class BoxedImages(ImageFiles):
    """Data set of images with the tokens of their boxes.

    Items: `image` (S, S, 3) float32 in [-1, 1], `file_path_`, `image_id`, and the tokens of each builder, by default
    `coordinates_bbox`.

    Args:
        images: the images with their boxes.
        size: S.
        crop_method: see `choose_window`.
        flip_p: probability of mirroring an image with its boxes.
        builders: entry → the builder of its tokens.
        keys: return only these entries (default: all).
    """

    def __init__(
        self,
        images: AnnotatedImages,
        size: int,
        crop_method: str,
        flip_p: float,
        builders: Mapping[str, LayoutTokenBuilder],
        keys: Sequence[str] | None = None,
    ) -> None:
        check_crop_method(crop_method)
        super().__init__(images.paths, {"image_id": images.ids}, keys)
        self.size, self.crop_method, self.flip_p = size, crop_method, flip_p
        self.table, self.classes = images.table, images.classes
        self.builders = dict(builders)

    @property
    def class_names(self) -> list[str]:
        """Names of the class tokens in their order, such as "Dog" and "Dog (group)", for `class_names` of a model."""
        return next(iter(self.builders.values())).token_names(self.classes.names)

    def read(self, index: int) -> Image.Image:
        """Read the image of an item.

        A large JPEG is decoded at half its size or less where the item shows all of its smaller side.

        Raises:
            UserError: the file is missing or is not an image.
        """
        min_side = None if self.crop_method == "random-2d" else OVERSAMPLING * self.size
        return open_image(self.paths[index], min_side=min_side)

    def tokens(self, objects: Objects, crop: Box, flip: bool) -> dict[str, Tensor]:
        """Return the tokens of the boxes in a view of an image, for each builder."""
        return {
            key: builder.encode(objects.boxes, objects.labels, crop, flip, objects.attributes)
            for key, builder in self.builders.items()
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, image = self.readable(index)
        width, height = image.size
        window = choose_window(width, height, self.size, self.crop_method, self.flip_p)
        crop = (window.left, window.top, window.right - window.left, window.bottom - window.top)
        item = {
            **self.entries(index),
            "image": to_image(np.asarray(window.view(image, self.size, METHOD))),
            **self.tokens(self.table[index], crop, window.flip),
        }
        return item if self.keys is None else {key: item[key] for key in self.keys}

    def plot(self, item: Mapping[str, Any], key: str = LAYOUT_KEY) -> Tensor:
        """Return the image (3, S, S) of an item with its boxes and their names on it, in [-1, 1]."""
        return self.builders[key].plot(item[key], (self.size, self.size), self.classes.names, item["image"])
