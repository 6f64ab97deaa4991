"""Pictures in files: which there are, and how they become the items of a data set.

Shapes: pixels (H, W, 3) uint8; images (H, W, 3) float32 in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.config.assets import locate
from ldm.errors import UserError, did_you_mean
from ldm.io.images import open_image
from ldm.modules.image_degradation.ops import from_pixels, resize, to_pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
PIL_METHODS = {
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}


def plain_entries(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item without its maps: its `image`, texts and numbers."""
    return {key: value for key, value in item.items() if key == "image" or isinstance(value, str | int | float)}


class PictureFiles(Dataset):
    """Picture files, with further entries for each.

    Items are `file_path_`, the entries of `labels`, and what subclasses' `image` makes of the pixels.

    Args:
        paths: the files.
        labels: entry → its value for each file.
        keys: only these entries, as for the published face sets; all by default.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Mapping[str, Sequence[Any]], keys: Sequence[str] | None = None
    ) -> None:
        self.paths = list(paths)
        self.labels = dict(labels)
        self.keys = keys

    def __len__(self) -> int:
        return len(self.paths)

    def entries(self, index: int) -> dict[str, Any]:
        """What is known of a picture without opening it."""
        return {"file_path_": str(self.paths[index]), **{key: values[index] for key, values in self.labels.items()}}

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (H, W, 3) uint8 as the model sees them, (S, S, 3) float32 in [-1, 1]."""
        return to_image(pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {**self.entries(index), "image": self.image(read_pixels(self.paths[index]))}
        return item if self.keys is None else {key: item[key] for key in self.keys}


class ListedPictures(PictureFiles):
    """The pictures that a text file lists, or all that lie in a folder.

    Items have the path within the folder as `relative_file_path_`.

    Args:
        txt_file: one path a line, relative to `data_root`.
        data_root: the folder; alone, all pictures below it are taken. Without either the class's own `list_file`
            and `folder` are. Relative paths are looked for in the current folder, then in the repository.
        keys: see `PictureFiles`.

    Raises:
        UserError: the list or the folder is missing, or there is no picture.
    """

    list_file: ClassVar[str | None] = None
    folder: ClassVar[str | None] = None

    def __init__(
        self, txt_file: str | None = None, data_root: str | None = None, keys: Sequence[str] | None = None
    ) -> None:
        name = type(self).__name__
        root = data_root or self.folder
        if root is None:
            raise UserError(f"{name} needs data_root: the folder of the pictures")
        listed = txt_file or (self.list_file if data_root is None else None)
        folder = existing_folder(root, name)
        names = read_list(listed, name) if listed else images_below(folder)
        if not names:
            raise UserError(f'{name}: "{listed or folder}" names no picture; check data_root and txt_file')
        super().__init__([folder / each for each in names], {"relative_file_path_": names}, keys)


def existing_folder(path: str | Path, name: str) -> Path:
    """`path`, in the current folder or in the repository, for the data set `name`.

    Raises:
        UserError: it is not there.
    """
    folder = locate(Path(path).expanduser())
    if not folder.is_dir():
        raise UserError(f'{name}: there is no folder "{path}"; put the pictures there, or set data_root')
    return folder


def read_list(path: str | Path, name: str) -> list[str]:
    """The lines of a text file, without empty ones, for the data set `name`.

    Raises:
        UserError: the file is not there.
    """
    file = locate(Path(path).expanduser())
    if not file.is_file():
        raise UserError(
            f'{name}: there is no list "{path}"; set txt_file to one, or data_root alone to take all of a folder'
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def images_below(folder: Path) -> list[str]:
    """The paths of all pictures in a folder and in its folders, linked ones too, relative to it and sorted."""
    found = []
    for place, _, files in os.walk(folder, followlinks=True):
        within = Path(place).relative_to(folder)
        found += [(within / file).as_posix() for file in files if file.lower().endswith(SUFFIXES)]
    return sorted(found)


def read_pixels(path: Path) -> np.ndarray:
    """A picture as (H, W, 3) uint8; of `.npy` files, arrays (3, H, W), (1, 3, H, W) or (H, W, 3) of uint8.

    Raises:
        UserError: the file is missing or is no picture.
    """
    if path.suffix.lower() != ".npy":
        return np.asarray(open_image(path))
    try:
        array = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read the picture "{path}": {error}; give an array of uint8') from None
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    array = np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] == 3 else array
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise UserError(f'the array "{path}" is no picture: its shape is {array.shape}, its type {array.dtype}')
    return array


def to_image(pixels: np.ndarray) -> np.ndarray:
    """Pixels as float32 in [-1, 1]."""
    return (pixels / 127.5 - 1.0).astype(np.float32)


def pil_method(name: str) -> Image.Resampling:
    """Pillow's method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PIL_METHODS:
        raise UserError(f'there is no interpolation "{name}"{did_you_mean(name, PIL_METHODS)}; Pillow has {_known()}')
    return PIL_METHODS[name]


def _known() -> str:
    return ", ".join(PIL_METHODS)


def resize_smaller_side(pixels: np.ndarray, size: int, method: str = "bilinear") -> np.ndarray:
    """Pixels whose smaller side is `size`, as OpenCV resizes by `method`; see `ops.RESIZE_METHODS`.

    As in OpenCV "area" averages only where the picture becomes smaller, and is bilinear otherwise.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    if side == size:
        return pixels
    method = "bilinear" if method == "area" and side < size else method
    shape = (max(size, round(height * size / side)), max(size, round(width * size / side)))
    return to_pixels(resize(from_pixels(pixels), shape, method))


def crop_square(pixels: np.ndarray, side: int, random: bool = False) -> np.ndarray:
    """A square of `side` pixels from the middle, or from anywhere; drawn from torch's global generator."""
    spare = [length - side for length in pixels.shape[:2]]
    top, left = (int(torch.randint(each + 1, ())) if random else each // 2 for each in spare)
    return pixels[top : top + side, left : left + side]


def fit_square(pixels: np.ndarray, size: int, random: bool = False) -> np.ndarray:
    """The smaller side resized to `size`, the longer one cropped in the middle or anywhere."""
    return crop_square(resize_smaller_side(pixels, size), size, random)
