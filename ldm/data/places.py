"""Places365 (Places-Standard): scenes with their class and a random mask, for in-painting (arXiv:2112.10752, E.2.2).

The folder has the files of the published archives:

    data_256/a/abbey/00000001.jpg       training images, or data_large, data_256_standard, data_large_standard
    val_256/Places365_val_00000001.jpg  validation images, or val_large
    places365_train_standard.txt        /a/abbey/00000001.jpg 1
    places365_val.txt                   Places365_val_00000001.jpg 165
    categories_places365.txt            /a/abbey 1

Any other folder of images serves too; the items then have no class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ldm.config.assets import locate
from ldm.data.image_files import ImageFiles, JoinedPaths, existing_folder, images_below, read_list, to_image
from ldm.data.inpainting import ItemMasks
from ldm.data.windows import find_window
from ldm.errors import UserError
from ldm.io.images import open_image
from ldm.models.diffusion.batch_keys import CLASS_KEY, CLASS_NAME_KEY

CATEGORIES = "categories_places365.txt"
OVERSAMPLING = 2  # a JPEG is decoded at a reduced size, as long as its sides are this many times larger than needed


class PlacesBase(ImageFiles):
    """Base class of the splits of Places365.

    Items: `image` (S, S, 3) float32 in [-1, 1], `mask` (S, S, 1), `masked_image`, `relative_file_path_`, `file_path_`,
    and where the lists state them, `class_label` and `human_label`.

    Args:
        size: resize the smaller side to this many pixels.
        crop_size: S (default: `size`).
        masks: kind of the masks, see `ldm.data.masks.find_masks`; None adds no masks.
        data_root: the folder with the files above, or a folder of images.
        txt_file: list of the images, relative to their folder, with or without the number of the class (default: the
            published list if it is in `data_root`, else all images).
        flip_p: probability of mirroring.
        keys: return only these entries (default: all).

    Raises:
        UserError: the images are missing, a list is invalid, or there are no such masks.
    """

    folder: ClassVar[str] = "data/places365"
    list_file: ClassVar[str]
    image_folders: ClassVar[tuple[str, ...]]
    random_crop: ClassVar[bool] = False
    fixed_masks: ClassVar[bool] = True

    def __init__(
        self,
        size: int = 256,
        crop_size: int | None = None,
        masks: str | None = "thick",
        data_root: str | None = None,
        txt_file: str | None = None,
        flip_p: float = 0.0,
        keys: Sequence[str] | None = None,
    ) -> None:
        name = type(self).__name__
        if crop_size is not None and crop_size > size:
            raise UserError(f"{name}: crop_size {crop_size} is larger than size {size}; lower it")
        self.size, self.crop_size, self.flip_p = size, crop_size or size, flip_p
        self.masks = None if masks is None else ItemMasks(masks, self.fixed_masks)
        root = existing_folder(data_root or self.folder, name)
        folder = next((path for part in self.image_folders if (path := root / part).is_dir()), root)
        listed = root / self.list_file
        source = txt_file or (str(listed) if listed.is_file() else None)
        if source is None:
            files, labels = images_below(folder), None
        else:
            files, labels = read_labelled_list(source, name)
        if not files:
            raise UserError(f'{name}: "{source or folder}" contains no image; check data_root and txt_file')
        entries: dict[str, Sequence[Any]] = {"relative_file_path_": files}
        if labels is not None:
            entries[CLASS_KEY] = labels
            entries[CLASS_NAME_KEY] = self._class_names(root, files, labels)
        super().__init__(JoinedPaths(folder, files), entries, keys)

    def _class_names(self, root: Path, files: Sequence[str], labels: Sequence[int]) -> list[str]:
        """Return the name of each image's class, or its number if no file states the name.

        Raises:
            UserError: the list of the classes is invalid.
        """
        if (root / CATEGORIES).is_file():
            folders, numbers = read_labelled_list(str(root / CATEGORIES), type(self).__name__)
            names = dict(zip(numbers or [], map(class_name, folders), strict=False))
        else:
            parents = (str(PurePosixPath(file).parent) for file in files)
            names = {label: class_name(part) for label, part in zip(labels, parents, strict=True) if part != "."}
        return [names.get(label, str(label)) for label in labels]

    def read(self, index: int) -> Image.Image:
        """Read an image.

        Raises:
            UserError: the file is missing or is not an image.
        """
        return open_image(self.paths[index], min_side=OVERSAMPLING * self.size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found, image = self.readable(index)
        width, height = image.size
        window = find_window(width, height, self.size, self.random_crop, self.flip_p, self.crop_size)
        pixels = np.asarray(window.view(image, self.crop_size, Image.Resampling.BICUBIC))
        item = {**self.entries(found), "image": to_image(pixels)}
        if self.masks is not None:
            item = self.masks.add(item, found)
        return item if self.keys is None else {key: item[key] for key in self.keys}


class PlacesTrain(PlacesBase):
    """Training images, cropped at random positions, with random masks."""

    list_file = "places365_train_standard.txt"
    image_folders = ("data_256", "data_256_standard", "data_large", "data_large_standard")
    random_crop = True
    fixed_masks = False


class PlacesValidation(PlacesBase):
    """Validation images, cropped at the centre, each with a fixed mask."""

    list_file = "places365_val.txt"
    image_folders = ("val_256", "val_large")


def read_labelled_list(path: str, name: str) -> tuple[list[str], list[int] | None]:
    """Read a list with lines such as "/a/abbey/00000001.jpg 1", for the data set `name`.

    Returns:
        The paths without the slash in front, and the labels; None if no line has a label.

    Raises:
        UserError: the file is missing, or only some lines have a label.
    """
    pairs = [_split(line) for line in read_list(path, name)]
    labels = [label for _, label in pairs if label is not None]
    if labels and len(labels) < len(pairs):
        number, (file, _) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[1] is None)
        raise UserError(f'{name}: "{locate(path)}" has no class for image {number}, "{file}"; complete the line')
    return [file for file, _ in pairs], labels or None


def _split(line: str) -> tuple[str, int | None]:
    file, _, label = line.rpartition(" ")
    return (file.strip().lstrip("/"), int(label)) if file and label.isdecimal() else (line.lstrip("/"), None)


def class_name(folder: str) -> str:
    """Return the name of a class from its folder: "a/apartment_building/outdoor" is "apartment building/outdoor"."""
    parts = PurePosixPath(folder.strip("/")).parts
    return "/".join(parts[1:] if len(parts) > 1 and len(parts[0]) == 1 else parts).replace("_", " ")
