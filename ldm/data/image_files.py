"""Data sets of image files: find, read, resize and crop them.

Shapes: pixels (H, W, 3) uint8; images (H, W, 3) float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.config.assets import locate
from ldm.data.unreadable import UnreadableFiles, check_share, find_faults
from ldm.errors import UserError, did_you_mean
from ldm.io.folders import list_files_below
from ldm.io.image_formats import image_suffixes
from ldm.io.images import open_image
from ldm.io.text import read_lines
from ldm.modules.image_degradation.ops import resize

ARRAY_SUFFIX = ".npy"
VALUES = (np.arange(256) / 127.5 - 1.0).astype(np.float32)  # of the pixels 0 … 255
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
    """Return the entries of an item that are its `image`, texts or numbers, not maps."""
    return {key: value for key, value in item.items() if key == "image" or isinstance(value, str | int | float)}


class JoinedPaths(Sequence[Path]):
    """Paths of files in a folder, which are built when they are used; a million of `Path` needs half a gigabyte.

    Args:
        folder: the folder.
        names: paths relative to it.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self.folder / name for name in self.names[index]]
        return self.folder / self.names[index]


class ImageFiles(Dataset):
    """Data set of image files with labels.

    Items: `file_path_`, the entries of `labels`, and `image`, which the method of that name computes from the pixels.
    An image that cannot be read is named once in the log, and the next image that can be read takes its place.

    Class attributes:
        max_unreadable: largest share of the files that may be unreadable when training starts; None skips this check.

    Args:
        paths: the image files.
        labels: entry → its value for each file.
        keys: return only these entries, as the published face data sets do (default: all).
    """

    max_unreadable: float | None = 0.01

    def __init__(
        self, paths: Sequence[Path], labels: Mapping[str, Sequence[Any]], keys: Sequence[str] | None = None
    ) -> None:
        self.paths: Sequence[Path] = paths if isinstance(paths, JoinedPaths) else list(paths)
        self.labels = dict(labels)
        self.keys = keys
        self.unreadable = UnreadableFiles(len(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def entries(self, index: int) -> dict[str, Any]:
        """Return the entries of an item except `image`, without opening the file."""
        return {"file_path_": str(self.paths[index]), **{key: values[index] for key, values in self.labels.items()}}

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """Convert pixels (H, W, 3) uint8 to the model's input, float32 in [-1, 1]; subclasses resize and crop."""
        return to_image(pixels)

    def read(self, index: int) -> Any:
        """Read the content of an item: here, pixels (H, W, 3) uint8.

        Raises:
            UserError: the file is missing or is not an image.
        """
        return read_pixels(self.paths[index])

    def readable(self, index: int) -> tuple[int, Any]:
        """Return the index of an item that can be read, `index` or the next one, and its content.

        Raises:
            UserError: no item can be read.
        """
        index = range(len(self))[index]  # an IndexError ends an iteration over the items
        return self.unreadable.replace(index, self.read, type(self).__name__)

    def check_files(self) -> None:
        """Find the files that cannot be read, which takes about 10 µs a file, and log them in one line.

        Raises:
            UserError: their share is larger than `max_unreadable`.
        """
        if self.max_unreadable is None or self.unreadable.is_checked:
            return
        faults = find_faults(self.paths, read_pixels)
        check_share(faults, [str(path) for path in self.paths], self.max_unreadable, type(self).__name__)
        self.unreadable.add_checked(faults)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index, pixels = self.readable(index)
        item = {**self.entries(index), "image": self.image(pixels)}
        return item if self.keys is None else {key: item[key] for key in self.keys}


class ListedImages(ImageFiles):
    """Data set of the images that a text file lists, or of all images in a folder.

    Items have the path within the folder as `relative_file_path_`. Without arguments the class attributes `list_file`
    and `folder` apply. Relative paths are looked up in the current folder, then in the repository.

    Args:
        txt_file: a file with one path a line, relative to `data_root`.
        data_root: the folder of the images; without `txt_file` it means all images below it.
        keys: see `ImageFiles`.

    Raises:
        UserError: the list or the folder is missing, or contains no image.
    """

    list_file: ClassVar[str | None] = None
    folder: ClassVar[str | None] = None

    def __init__(
        self, txt_file: str | None = None, data_root: str | None = None, keys: Sequence[str] | None = None
    ) -> None:
        name = type(self).__name__
        root = data_root or self.folder
        if root is None:
            raise UserError(f"{name} needs data_root, the folder of the images")
        listed = txt_file or (self.list_file if data_root is None else None)
        folder = existing_folder(root, name)
        files = read_list(listed, name) if listed else images_below(folder)
        if not files:
            raise UserError(f'{name}: "{listed or folder}" contains no image; check data_root and txt_file')
        super().__init__(JoinedPaths(folder, files), {"relative_file_path_": files}, keys)


def existing_folder(path: str | Path, name: str) -> Path:
    """Locate the folder `path` in the current folder or in the repository, for the data set `name`.

    Raises:
        UserError: the folder does not exist.
    """
    folder = locate(Path(path).expanduser())
    if not folder.is_dir():
        raise UserError(f'{name}: there is no folder "{path}"; put the images there, or set data_root')
    return folder


def read_list(path: str | Path, name: str) -> list[str]:
    """Read the lines of a text file, except empty ones, for the data set `name`.

    Raises:
        UserError: the file does not exist, or is not text.
    """
    file = locate(Path(path).expanduser())
    if not file.is_file():
        raise UserError(
            f'{name}: there is no list "{path}"; set txt_file to one, or data_root alone to use all images of a folder'
        )
    return [line.strip() for line in read_lines(file, "list of images") if line.strip()]


def images_below(folder: Path) -> list[str]:
    """Return the sorted paths of all images and arrays below a folder, relative to it, and log the number of others.

    See `ldm.io.folders.list_files_below` for linked and hidden folders.
    """
    listing = list_files_below(folder, {*image_suffixes(), ARRAY_SUFFIX})
    listing.log_others("images")
    return listing.files


def read_pixels(path: Path, min_side: int | None = None) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8.

    A `.npy` file must contain a uint8 array (3, H, W), (1, 3, H, W) or (H, W, 3).

    Args:
        path: the file.
        min_side: see `ldm.io.images.decode_image`.

    Raises:
        UserError: the file is missing or is not an image.
    """
    if path.suffix.lower() != ARRAY_SUFFIX:
        return np.asarray(open_image(path, min_side=min_side))
    try:
        array = np.load(path)
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f'cannot read the image "{path}": {error}; give an array of uint8') from None
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    array = np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] == 3 else array
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise UserError(f'the array "{path}" is not an image: its shape is {array.shape}, its dtype {array.dtype}')
    return array


def to_image(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels from uint8 to float32 in [-1, 1]."""
    import cv2

    if pixels.dtype != np.uint8 or pixels.size == 0:
        return (pixels / 127.5 - 1.0).astype(np.float32)
    return cv2.LUT(np.ascontiguousarray(pixels).reshape(1, -1), VALUES).reshape(pixels.shape)  # a third of the time


def pil_method(name: str) -> Image.Resampling:
    """Return the resampling filter of Pillow called `name`.

    Raises:
        UserError: the name is unknown.
    """
    if name not in PIL_METHODS:
        known = ", ".join(PIL_METHODS)
        raise UserError(f'there is no interpolation "{name}"{did_you_mean(name, PIL_METHODS)}; choose one of {known}')
    return PIL_METHODS[name]


def resize_smaller_side(pixels: np.ndarray, size: int, method: str = "bilinear") -> np.ndarray:
    """Resize pixels so that the smaller side is `size`, with a method of OpenCV; see `ops.RESIZE_METHODS`.

    The method "area" averages pixels when it reduces the size, and interpolates bilinearly otherwise.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    if side == size:
        return pixels
    method = "bilinear" if method == "area" and side < size else method
    shape = (max(size, round(height * size / side)), max(size, round(width * size / side)))
    return resize(pixels, shape, method)


def crop_square(pixels: np.ndarray, side: int, random: bool = False) -> np.ndarray:
    """Crop a square of `side` pixels at the centre, or at a position from PyTorch's global generator."""
    margins = [length - side for length in pixels.shape[:2]]
    top, left = (int(torch.randint(margin + 1, ())) if random else margin // 2 for margin in margins)
    return pixels[top : top + side, left : left + side]


def fit_square(pixels: np.ndarray, size: int, random: bool = False) -> np.ndarray:
    """Resize the smaller side to `size` and crop the longer side at the centre or at a random position."""
    return crop_square(resize_smaller_side(pixels, size), size, random)
