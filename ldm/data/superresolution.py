"""Pairs of an image and its smaller, degraded version, to train super-resolution models.

Shapes: pixels (H, W, 3) uint8; images float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from ldm.config.instantiate import instantiate_from_config
from ldm.data.image_files import (
    PIL_METHODS,
    ImageFiles,
    crop_square,
    pil_method,
    plain_entries,
    read_pixels,
    resize_smaller_side,
    to_image,
)
from ldm.errors import UserError, did_you_mean
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.ops import RESIZE_METHODS, resize, to_pixels

BSR = {"bsrgan": degradation_fn_bsr, "bsrgan_light": degradation_fn_bsr_light}
DEGRADATIONS = (
    *BSR,
    *(f"cv_{method}" for method in RESIZE_METHODS),
    *(f"pil_{method}" for method in PIL_METHODS if method != "linear"),
)


class SuperResolution(Dataset):
    """Square crops of images, each with a degraded version `downscale_f` times smaller.

    Items: the entries of the image file, `image` (size, size, 3) and `LR_image` (size / downscale_f, …, 3), both
    float32 in [-1, 1]. All randomness comes from PyTorch's global generator.

    Args:
        images: the image files: `ImageFiles`, or a data set whose items have their `file_path_`.
        size: side of `image` in pixels.
        degradation: "bsrgan" or "bsrgan_light" (see `ldm.modules.image_degradation`), or a resampling filter of OpenCV
            ("cv_area", …) or Pillow ("pil_bicubic", …); see `DEGRADATIONS`.
        downscale_f: downscaling factor.
        min_crop_f, max_crop_f: range of the crop's side, as fractions of the smaller side of the file.
        random_crop: crop at a random position; otherwise at the centre.

    Raises:
        UserError: the degradation is unknown, or a value is out of range.
    """

    def __init__(
        self,
        images: Dataset,
        /,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
    ) -> None:
        name = type(self).__name__
        if not size or size % downscale_f:
            raise UserError(f"{name}: size must be a multiple of downscale_f ({downscale_f}), not {size}")
        if not 0 < min_crop_f <= max_crop_f <= 1:
            raise UserError(f"{name}: 0 < min_crop_f <= max_crop_f <= 1 does not hold for {min_crop_f}, {max_crop_f}")
        self.images = images
        self.size = size
        self.min_crop_f, self.max_crop_f = min_crop_f, max_crop_f
        self.random_crop = random_crop
        self.LR_size = size // downscale_f
        self.degrade = find_degradation(degradation, size // downscale_f, downscale_f)

    def __len__(self) -> int:
        return len(cast(Sized, self.images))

    @property
    def base(self) -> Dataset:
        """The image files, by the published name."""
        return self.images

    @property
    def center_crop(self) -> bool:
        """Return whether crops are at the centre."""
        return not self.random_crop

    def __getitem__(self, index: int) -> dict[str, Any]:
        entries, pixels = self._read(index)
        fraction = self.min_crop_f + (self.max_crop_f - self.min_crop_f) * torch.rand(()).item()
        side = max(1, int(min(pixels.shape[:2]) * fraction))
        pixels = resize_smaller_side(crop_square(pixels, side, self.random_crop), self.size, "area")
        small = self.degrade(np.ascontiguousarray(pixels))
        return {**entries, "image": to_image(pixels), "LR_image": to_image(small)}

    def _read(self, index: int) -> tuple[dict[str, Any], np.ndarray]:
        """Return the entries of an image file except `image`, and its pixels."""
        images: Any = self.images
        while isinstance(images, Subset):
            images, index = images.dataset, images.indices[index]
        if isinstance(images, ImageFiles):
            index, pixels = images.readable(index)
            return images.entries(index), pixels
        entries = plain_entries(images[index])
        return entries, read_pixels(Path(entries["file_path_"]))


class SmallerPictures(Dataset):
    """Wrapper that adds a version `downscale_f` times smaller to each item of a data set of square images.

    Items: `image`, texts and numbers of the wrapped data set, and `LR_image` (S / downscale_f, …, 3) float32 in
    [-1, 1]. PyTorch's global generator determines the random degradations.

    Args:
        dataset: `target` and `params` of the wrapped data set.
        degradation, downscale_f: as in `SuperResolution`.
        fixed: derive each degradation from the index of the item instead, for validation.

    Raises:
        UserError: the degradation is unknown, or an image is not square or not divisible by `downscale_f`.
    """

    def __init__(
        self,
        dataset: Mapping[str, Any],
        degradation: str = "pil_bicubic",
        downscale_f: int = 4,
        fixed: bool = False,
    ) -> None:
        self.dataset = instantiate_from_config(dataset)
        self.shape = self.dataset[0]["image"].shape
        self.fixed = fixed
        height, width = self.shape[:2]
        if height != width:
            raise UserError(f"SmallerPictures: images must be square, not {width} × {height} px; crop them")
        if height % downscale_f:
            raise UserError(f"SmallerPictures: images of {height} px are not divisible by downscale_f ({downscale_f})")
        self.degrade = find_degradation(degradation, height // downscale_f, downscale_f)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = plain_entries(self.dataset[index])
        if item["image"].shape != self.shape:
            sizes = " and ".join(f"{width} × {height}" for height, width, _ in (self.shape, item["image"].shape))
            raise UserError(f"SmallerPictures: images must have one size, not {sizes} px; set their size")
        pixels = to_pixels((item["image"] + 1.0) / 2.0)
        return {**item, "LR_image": to_image(self._degraded(pixels, index))}

    def _degraded(self, pixels: np.ndarray, index: int) -> np.ndarray:
        if not self.fixed:
            return self.degrade(pixels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            return self.degrade(pixels)


def find_degradation(name: str | None, size: int, factor: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the degradation `name`, which maps pixels (size · factor, size · factor, 3) to (size, size, 3).

    Raises:
        UserError: the name is unknown.
    """
    if name not in DEGRADATIONS:
        hint = did_you_mean(str(name), DEGRADATIONS)
        raise UserError(f'there is no degradation "{name}"{hint}; choose one of {", ".join(DEGRADATIONS)}')
    library, _, method = name.partition("_")
    if name in BSR:
        return partial(_bsr, BSR[name], factor)
    return partial(_pil, pil_method(method), size) if library == "pil" else partial(_cv, method, size)


def _bsr(function: Callable[..., dict[str, np.ndarray]], factor: int, pixels: np.ndarray) -> np.ndarray:
    return function(image=pixels, sf=factor)["image"]


def _pil(method: Image.Resampling, size: int, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size, size), method))


def _cv(method: str, size: int, pixels: np.ndarray) -> np.ndarray:
    return resize(pixels, (size, size), method)
