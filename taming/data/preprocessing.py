from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.data.image_files import pil_method, resize_smaller_side
from ldm.errors import UserError
from ldm.modules.image_degradation.ops import to_pixels

__all__ = ["Preprocessor", "get_preprocessor", "imscale", "rescale"]


def rescale(x: np.ndarray, size: int) -> np.ndarray:
    """Resize the smaller side to `size` pixels with bilinear interpolation, as OpenCV does.

    Args:
        x: (H, W, C) or (H, W), uint8 or floats in [-1, 1].
        size: number of pixels.
    """
    if x.dtype == np.uint8 or min(x.shape[:2]) == size:
        return resize_smaller_side(x, size)
    return (2 * resize_smaller_side((x + 1) / 2, size) - 1).astype(x.dtype)


class Preprocessor:
    """Function of named arrays (H, W, …) of one size, which resizes, crops and mirrors all of them alike.

    PyTorch's global generator determines the random position and mirroring.

    Args:
        size: resize the smaller side to this many pixels first; None keeps the size.
        crop_size: side of the square; None does not crop.
        random_crop: crop at a random position; otherwise at the centre.
        flip_p: probability of mirroring.
    """

    def __init__(self, size: int | None, crop_size: int | None, random_crop: bool = False, flip_p: float = 0.0) -> None:
        self.size, self.crop_size, self.random_crop, self.flip_p = size, crop_size, random_crop, flip_p

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        if self.size:
            arrays = {name: rescale(x, self.size) for name, x in arrays.items()}
        if self.crop_size:
            side, (height, width) = self.crop_size, next(iter(arrays.values())).shape[:2]
            if min(height, width) < side:
                raise UserError(f"crop_size {side} is larger than the image, {width} × {height} pixels; set size")
            margins = (height - side, width - side)
            top, left = (int(torch.randint(m + 1, ())) if self.random_crop else m // 2 for m in margins)
            arrays = {name: x[top : top + side, left : left + side] for name, x in arrays.items()}
        if self.flip_p and torch.rand(()) < self.flip_p:
            arrays = {name: x[:, ::-1] for name, x in arrays.items()}
        return {name: np.ascontiguousarray(x) for name, x in arrays.items()}


def get_preprocessor(
    size: int | None = None, random_crop: bool = False, additional_targets: Any = None, crop_size: int | None = None
) -> Callable[..., dict[str, np.ndarray]]:
    """Return a function that resizes and crops `image=…` and other arrays, and mirrors them if crops are random.

    Args:
        size: side of the squares; the smaller side is resized to it.
        random_crop: crop at a random position, and with `size` mirror half of the time; otherwise at the centre.
        additional_targets: unused; all named arrays are treated alike.
        crop_size: side of the squares without resizing, if there is no `size`.
    """
    if size:
        return Preprocessor(size, size, random_crop, flip_p=0.5 if random_crop else 0.0)
    return Preprocessor(None, crop_size, random_crop)


def imscale(x: np.ndarray, factor: int | None, keepshapes: bool = False, keepmode: str = "bicubic") -> np.ndarray:
    """Reduce an image by a factor with Pillow's bicubic filter.

    Args:
        x: (H, W, 3), floats in [-1, 1].
        factor: None or 1 returns `x`.
        keepshapes: enlarge the result to the size of `x`.
        keepmode: filter for that, "nearest", "bilinear" or "bicubic".
    """
    if factor is None or factor == 1:
        return x
    height, width = x.shape[:2]
    if min(height, width) < factor:
        raise UserError(f"an image of {width} × {height} pixels cannot be reduced by {factor}; lower the factor")
    image = Image.fromarray(to_pixels((x + 1.0) / 2.0))
    image = image.resize((width // factor, height // factor), Image.Resampling.BICUBIC)
    if keepshapes:
        image = image.resize((width, height), pil_method(keepmode))
    return (np.asarray(image) / 127.5 - 1.0).astype(x.dtype)
