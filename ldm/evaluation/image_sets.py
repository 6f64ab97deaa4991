"""Sets of images to measure: folders and NPZ archives; shards are in `ldm.evaluation.shards`.

Images are (H, W, 3) uint8. All images of a set have one size.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ldm.config.assets import locate
from ldm.errors import UserError
from ldm.io.folders import list_files_below
from ldm.io.image_formats import image_suffixes
from ldm.io.npz import array_shapes, read_rows

THREADS = min(8, os.cpu_count() or 1)
IMAGES = "arr_0"  # array of images in an NPZ archive
STATISTICS = ("mu", "sigma")  # arrays of statistics in an NPZ archive
GREY, DEEP = ("1", "L", "LA"), ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow

T = TypeVar("T")
Named = tuple[str, np.ndarray]


class ImageSet(ABC):
    """Set of images with an order."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the set in messages."""

    @property
    @abstractmethod
    def preparation(self) -> str:
        """Preparation of the images, such as "none" or the crop."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def key(self) -> str | None:
        """Return a hash of the files and of the preparation, which is equal only for equal images; None if unknown."""

    @abstractmethod
    def images(self, start: int = 0) -> Iterator[Named]:
        """Yield the name and the pixels of each image from the index `start` on.

        Raises:
            UserError: an image cannot be read, or is not RGB with 8 bits.
        """

    def size(self) -> str:
        """Return the size of the first image, such as "256 × 256".

        Raises:
            UserError: the image cannot be read, or is not RGB with 8 bits.
        """
        images = self.images()
        return size_of(next(images)[1])

    def batches(
        self, batch_size: int, start: int = 0, part: int | None = None
    ) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield the names and the pixels (B, H, W, 3) of the images, `batch_size` at once.

        Args:
            batch_size: largest number of images of a batch.
            start: index of the first image.
            part: a batch ends after this many images, and after each multiple of it.

        Raises:
            UserError: an image cannot be read, or has another size than the first one.
        """
        first: Named | None = None
        images = self.images(start)
        for batch in in_parts(images, batch_size, part or len(self)):
            first = first or batch[0]
            for name, pixels in batch:
                if pixels.shape != first[1].shape:
                    raise UserError(
                        f"the images of {self.name} have different sizes: {size_of(first[1])} ({first[0]}) and "
                        f"{size_of(pixels)} ({name}); give images of one size, or use --size"
                    )
            yield [name for name, _ in batch], np.stack([pixels for _, pixels in batch])


def size_of(pixels: np.ndarray) -> str:
    """Return the size of an image, such as "256 × 256"."""
    return f"{pixels.shape[1]} × {pixels.shape[0]}"


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def in_parts(items: Iterator[T], size: int, part: int) -> Iterator[list[T]]:
    """Yield lists of up to `size` items, which end after each multiple of `part` items."""
    while first := list(itertools.islice(items, 1)):
        yield from batched(itertools.chain(first, itertools.islice(items, part - 1)), size)


def ahead(function: Callable[[T], Named], items: Iterable[T]) -> Iterator[Named]:
    """Yield the results of a function in order; threads compute a few of them in advance."""
    iterator = iter(items)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(iterator, 4 * THREADS))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(iterator, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def hash_of(*parts: Any) -> str:
    """Return the SHA-256 of values that JSON can express."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def stamp_of(path: Path) -> list[int]:
    """Return the size of a file, and the time of its last change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@dataclass
class ImageFolder(ImageSet):
    """Images in a folder and below, in the order of their names.

    Args:
        folder: the folder.
        side: use the centred square of each image, resized to this side and converted to RGB. Default: images as they
            are, which must be RGB with 8 bits.
        limit: use only the first images; default: all.
    """

    folder: Path
    side: int | None = None
    limit: int | None = None

    @property
    def name(self) -> str:
        """Name of the set in messages."""
        return f'"{self.folder}"'

    @property
    def preparation(self) -> str:
        """Preparation of the images."""
        return "none" if self.side is None else f"centred square, Lanczos to {self.side} px, RGB"

    @cached_property
    def files(self) -> list[str]:
        """Paths of the images in the folder.

        Raises:
            UserError: the folder is missing or contains no image, or fewer than `limit`.
        """
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.name}; check the path")
        listing = list_files_below(self.folder, image_suffixes())
        if not listing.files:
            raise UserError(f"there is no image in {self.name}; give a folder with PNG, JPEG or WebP files")
        if self.limit is not None and self.limit > len(listing.files):
            raise UserError(f"{self.name} has {len(listing.files)} images, fewer than --n {self.limit}")
        return listing.files[: self.limit]

    def __len__(self) -> int:
        return len(self.files)

    def key(self) -> str:
        """Return a hash of the names, sizes and times of change of the files, and of the preparation."""
        stamps = [[name, *stamp_of(self.folder / name)] for name in self.files]
        return hash_of("folder", str(self.folder.resolve()), stamps, self.preparation)

    def images(self, start: int = 0) -> Iterator[Named]:
        """Yield the name and the pixels of each image from the index `start` on."""
        return ahead(self._read, self.files[start:])

    def _read(self, name: str) -> Named:
        return name, read_pixels(self.folder / name, self.side)


def read_pixels(path: Path, size: int | None = None, data: bytes | None = None) -> np.ndarray:
    """Return an image (H, W, 3) uint8.

    Args:
        path: the file.
        size: use the centred square, resized to this side and converted to RGB.
        data: the content of the file, if it has been read already.

    Raises:
        UserError: the image cannot be read, or without `size` is not RGB with 8 bits.
    """
    from PIL import Image, ImageOps

    from ldm.io.images import decode_image, open_image

    if size is not None:
        return np.asarray(ImageOps.fit(open_image(path, data=data), (size, size), Image.Resampling.LANCZOS))
    image = decode_image(path, data=data)
    if image.mode in DEEP:
        raise UserError(f'the image "{path}" has 16 or 32 bits; convert it to RGB with 8 bits, or use --size')
    if image.mode in GREY:
        raise UserError(f'the image "{path}" is grey; convert it to RGB, or use --size')
    if image.mode != "RGB":
        raise UserError(f'the image "{path}" has the mode {image.mode}, not RGB; convert it, or use --size')
    return np.asarray(image)


@dataclass
class ImageArchive(ImageSet):
    """Images in the array `arr_0` of an NPZ archive, as `sample_diffusion` and ADM's scripts write them.

    Args:
        path: the archive.
        limit: use only the first images; default: all.

    Raises:
        UserError: the archive is damaged, or has no array of images.
    """

    path: Path
    limit: int | None = None
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        arrays = array_shapes(self.path)
        if IMAGES not in arrays:
            known = ", ".join(arrays) or "none"
            raise UserError(f'{self.name} has no array "{IMAGES}" of images (arrays: {known}); give another file')
        self.shape, dtype = arrays[IMAGES]
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[-1] != 3 or 0 in self.shape:
            raise UserError(
                f'{self.name} has an array "{IMAGES}" of {dtype} and shape {self.shape}; images need (N, H, W, 3) uint8'
            )
        if self.limit is not None and self.limit > self.shape[0]:
            raise UserError(f"{self.name} has {self.shape[0]} images, fewer than --n {self.limit}")

    @property
    def name(self) -> str:
        """Name of the set in messages."""
        return f'"{self.path}"'

    @property
    def preparation(self) -> str:
        """Preparation of the images."""
        return "none"

    def __len__(self) -> int:
        return self.limit or self.shape[0]

    def key(self) -> str:
        """Return a hash of the name, size and time of change of the file."""
        return hash_of("archive", str(self.path.resolve()), stamp_of(self.path), len(self))

    def images(self, start: int = 0) -> Iterator[Named]:
        """Yield the number and the pixels of each image from the index `start` on."""
        rows = itertools.islice(read_rows(self.path, IMAGES), start, len(self))
        return ((str(number), pixels) for number, pixels in enumerate(rows, start))


def has_statistics(path: Path) -> bool:
    """Return whether an NPZ archive contains statistics of features, `mu` and `sigma`.

    Raises:
        UserError: the archive is damaged.
    """
    return {*STATISTICS} <= array_shapes(path).keys()


def open_images(path: str | Path, size: int | None = None, limit: int | None = None) -> ImageSet:
    """Return the images in a folder, in an NPZ archive, or in shards of WebDataset.

    Raises:
        UserError: there are none.
    """
    from ldm.evaluation.shards import SHARD, ShardImages

    if SHARD.search(str(path)):
        return ShardImages(str(path), size, limit)
    found = locate(path)
    if found.is_dir():
        return ImageFolder(found, size, limit)
    if found.suffix == ".npz":
        if size is not None:
            raise UserError(f'--size is for folders of images, not for "{found}"; leave it out')
        return ImageArchive(found, limit)
    raise UserError(f'"{path}" is neither a folder of images nor an NPZ file, nor shards; check the path')
