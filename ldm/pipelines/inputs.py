"""Convert images, masks and label maps of any type (PIL, NumPy, torch) to the pixels that pipelines work on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    ImageLike = Image | np.ndarray | Tensor


def as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """Return a list of images from one image, a sequence of images, or a batch (B, C, H, W) or (B, H, W, C)."""
    if _is_pil(images):
        return [images]
    if hasattr(images, "ndim"):
        return list(images) if images.ndim == 4 else [images]
    return list(images)


def as_pixels(image: ImageLike) -> np.ndarray:
    """Return an image as (H, W, 3) uint8.

    Args:
        image: a PIL image (transparent parts become white); uint8 values (H, W), (H, W, C) or (C, H, W); or float
            values of the same shapes in [-1, 1]. C is 1, 3 or 4.

    Raises:
        ValueError: The array has another shape or type.
    """
    from ldm.io.pixels import to_uint8

    if _is_pil(image):
        from ldm.io.images import as_rgb

        return np.asarray(as_rgb(image))
    array = _as_array(image)
    if array.dtype.kind != "f" and array.dtype != np.uint8:
        raise ValueError(f"an image has uint8 values, or float values in [-1, 1], got {array.dtype}")
    pixels = to_uint8(array[..., None] if array.ndim == 2 else array)
    if pixels.ndim != 3:
        raise ValueError(f"an image has the shape (H, W), (H, W, C) or (C, H, W), got {array.shape}")
    if pixels.shape[-1] == 4:
        from PIL import Image

        return as_pixels(Image.fromarray(pixels))
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def as_mask(mask: ImageLike) -> np.ndarray:
    """Return a mask as (H, W) bool, True where it is white, half or more.

    Args:
        mask: a PIL image (transparent parts count as black); bool values; integers, white from 128, or from 1 if no
            value is larger than 1; or float values in [0, 1], white from 0.5. Arrays have the shape (H, W), (1, H, W)
            or (H, W, 1).

    Raises:
        ValueError: The array has another shape.
    """
    if _is_pil(mask):
        from PIL import Image

        if mask.has_transparency_data:
            rgba = mask.convert("RGBA")
            mask = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
        return np.asarray(mask.convert("L")) >= 128
    array = _as_array(mask)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise ValueError(f"a mask has the shape (H, W), (1, H, W) or (H, W, 1), got {array.shape}")
    if array.dtype == bool:
        return array
    if array.dtype.kind == "f":
        return array >= 0.5
    return array >= (128 if array.max(initial=0) > 1 else 1)


def as_labels(label_map: ImageLike) -> np.ndarray:
    """Return a label map as (H, W) int64: the values of a grey or palette image, or of an integer array.

    Raises:
        ValueError: It is a colour image, or an array of another shape or type.
    """
    array = _as_array(label_map)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"a label map has integer values of the shape (H, W), got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _as_array(image: Any) -> np.ndarray:
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        return image.numpy()
    return np.asarray(image)


def _is_pil(image: Any) -> bool:
    return hasattr(image, "getbands")


def broadcast(values: Any, count: int, name: str) -> list[Any]:
    """Return one value for each of `count` images: the values given, or one value repeated.

    Raises:
        ValueError: There are several values, but not `count`.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values] * count
    if len(values) == 1:
        return list(values) * count
    if len(values) != count:
        raise ValueError(f"{count} images need {count} {name} or one, got {len(values)}")
    return list(values)
