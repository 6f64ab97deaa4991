"""Data sets of images with label maps, for semantic synthesis."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.companions import LabelMap
from ldm.data.faults import Faults
from ldm.data.image_files import ImageFiles, pil_method, to_image
from ldm.data.unreadable import SharedFlags, check_share, find_faults
from ldm.data.windows import find_window
from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.models.diffusion.batch_keys import SEGMENTATION_KEY

logger = logging.getLogger(__name__)

NO_LABEL = 255  # in maps of 8 bits, as in COCO-Stuff
OVERSAMPLING = 2  # a JPEG is decoded at a reduced size, as long as its sides are this many times larger than needed


class OneHotMap(LabelMap):
    """Label map as one channel a label.

    Args:
        n_labels, palette: see `LabelMap`.
        shift: add 1 to the labels, so that the label 0 means "no label", as published for COCO-Stuff with 183 labels.
        as_float32: return float32; otherwise uint8, which needs a quarter of the memory.
    """

    def __init__(self, n_labels: int, palette: str | None = None, shift: bool = False, as_float32: bool = True) -> None:
        super().__init__(n_labels, palette)
        self.shift = shift
        self._warned = SharedFlags(1)
        self.dtype = np.float32 if as_float32 else np.uint8

    def labels(self, path: Path) -> np.ndarray:
        """See `LabelMap`."""
        labels = super().labels(path)
        wrong = (labels + self.shift >= self.n_labels) & (labels != NO_LABEL)
        if wrong.any() and self._warned.set(0):
            logger.warning(
                'the label map "%s" has %d pixels with labels such as %d, but there are %d labels; they count as no '
                "label, here and in other maps",
                *(path, wrong.sum(), labels[wrong][0], self.n_labels),
            )
        return np.where(labels == NO_LABEL, 0, labels + 1) if self.shift else labels


class LabelMapImages(ImageFiles):
    """Data set of images with their label maps, cropped and mirrored alike.

    Items: `image` (S, S, 3) float32 in [-1, 1], `segmentation` (S, S, n_labels) with 1 in the channel of the label,
    `file_path_`, `segmentation_path_` and the entries of `labels`. Pixels without a label are 0 in all channels.

    Args:
        paths: the images.
        map_paths: the label map of each image.
        labels: entry → its value for each image.
        label_map: form of the maps.
        size: resize the smaller side to this many pixels; None keeps the images and maps as they are.
        crop_size: S (default: `size`).
        random_crop: crop at random positions; otherwise at the centre.
        flip_p: probability of mirroring.
        interpolation: method of Pillow for the images; maps take the nearest label.
        keys: return only these entries (default: all).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        map_paths: Sequence[Path],
        labels: Mapping[str, Sequence[Any]],
        label_map: LabelMap,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        flip_p: float = 0.0,
        interpolation: str = "bicubic",
        keys: Sequence[str] | None = None,
    ) -> None:
        if crop_size is not None and crop_size > (size or 0):
            raise UserError(f"crop_size is {crop_size}, but size is {size}; set size to {crop_size} or more")
        super().__init__(paths, {**labels, "segmentation_path_": [str(path) for path in map_paths]}, keys)
        self.map_paths, self.label_map = list(map_paths), label_map
        self.size, self.crop_size = size, crop_size or size
        self.random_crop, self.flip_p, self.method = random_crop, flip_p, pil_method(interpolation)

    def check_files(self) -> None:
        """See `ImageFiles.check_files`; the maps are checked too."""
        if self.max_unreadable is not None and not self.unreadable.is_checked:
            faults = find_faults(self.map_paths, self.label_map.read)
            names = [str(path) for path in self.map_paths]
            check_share(faults, names, self.max_unreadable, f"{type(self).__name__}, label maps")
            for index in faults:
                self.unreadable.set(index)
        super().check_files()

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Read an image and its label map.

        Raises:
            UserError: a file is missing or cannot be read, or the two have other proportions.
        """
        min_side = None if self.size is None else OVERSAMPLING * self.size
        image = open_image(self.paths[index], min_side=min_side)
        return image, self.label_map.read_matching(self.map_paths[index], image.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, (image, labels) = self.readable(index)
        item = {**self.entries(index), **self._views(image, labels)}
        return item if self.keys is None else {key: item[key] for key in self.keys}

    def _views(self, image: Image.Image, labels: Image.Image) -> dict[str, Any]:
        if self.size is None or self.crop_size is None:
            if labels.size != image.size:
                labels = labels.resize(image.size, Image.Resampling.NEAREST)
            return {"image": to_image(np.asarray(image)), SEGMENTATION_KEY: self.label_map.one_hot(np.asarray(labels))}
        window = find_window(*image.size, self.size, self.random_crop, self.flip_p, self.crop_size)
        view = to_image(np.asarray(window.view(image, self.crop_size, self.method)))
        return {"image": view, **self.label_map.entries(labels, window, view)}


def find_pairs(images: Sequence[str], folder: Path, map_folder: Path, source: str) -> tuple[list[str], list[Path]]:
    """Return the images that exist and have a label map, and their maps; one log line counts the others.

    The map of `a/b.jpg` is `a/b.png` in the folder of the maps.

    Args:
        images: paths of the images relative to `folder`.
        folder, map_folder: folders of the images and of the maps.
        source: name of the list of images in messages.

    Raises:
        UserError: no image has a map.
    """
    faults = Faults(source)
    found, maps = [], []
    for name in images:
        path = map_folder / PurePosixPath(name).with_suffix(".png")
        if not (folder / name).is_file():
            faults.add("images that are missing", [name])
        elif not path.is_file():
            faults.add("images without a label map", [name])
        else:
            found.append(name)
            maps.append(path)
    faults.log()
    if not found:
        reason = faults.text() or "it is empty"
        raise UserError(f'"{source}" has no image with a label map in "{map_folder}": {reason}; check both folders')
    return found, maps
