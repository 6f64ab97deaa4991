"""Convert images, masks and label maps of any type (PIL, NumPy, torch) to the pixels that pipelines work on."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    ImageLike = Image | np.ndarray | Tensor

CHANNELS = {1, 3, 4}


def as_list(images: ImageLike | Iterable[ImageLike]) -> list[ImageLike]:
    """Return a list of images from one image, a sequence of images, or a batch (B, C, H, W) or (B, H, W, C)."""
    if _is_pil(images):
        return [images]
    if isinstance(images, str | PathLike):
        raise TypeError(f'images are PIL images, arrays or tensors, not paths; open "{images}" with PIL.Image.open')
    if hasattr(images, "ndim"):
        array = cast("np.ndarray | Tensor", images)
        return list(array) if array.ndim == 4 else [array]
    return list(cast("Iterable[ImageLike]", images))


def as_pixels(image: ImageLike) -> np.ndarray:
    """Return an image as (H, W, 3) uint8.

    Args:
        image: a PIL image (transparent parts become white); uint8 values (H, W), (H, W, C) or (C, H, W); or float
            values of the same shapes in [-1, 1]. C is 1, 3 or 4; if a shape fits both orders, the channels of a NumPy
            array come last, and those of a tensor first.

    Raises:
        ValueError: The array has another shape or type, or values that are not finite.
    """
    from ldm.io.pixels import to_uint8

    if _is_pil(image):
        from ldm.io.images import as_rgb

        return np.asarray(as_rgb(image))
    array = _as_array(image)
    if array.dtype.kind != "f" and array.dtype != np.uint8:
        raise ValueError(f"an image has uint8 values, or float values in [-1, 1], got {array.dtype}")
    pixels = to_uint8(_channels_first(array, prefer_first=hasattr(image, "detach")))
    if pixels.shape[-1] == 4:
        from PIL import Image

        return as_pixels(Image.fromarray(pixels))
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _channels_first(array: np.ndarray, prefer_first: bool) -> np.ndarray:
    """Return an image as (C, H, W); `prefer_first` decides about a shape that fits both orders."""
    if array.ndim == 2:
        return array[None]
    first, last = (array.ndim == 3 and array.shape[axis] in CHANNELS for axis in (0, -1))
    if not first and not last:
        raise ValueError(
            f"an image has the shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, got {array.shape}"
        )
    return np.moveaxis(array, -1, 0) if last and not (first and prefer_first) else array


def as_mask(mask: ImageLike) -> np.ndarray:
    """Return a mask as (H, W) bool, True where it is white, half or more.

    Args:
        mask: a PIL image (transparent parts count as black); bool values; integers, white from 128, or from 1 if no
            value is larger than 1; or float values in [0, 1], white from 0.5. Arrays have the shape (H, W), (1, H, W)
            or (H, W, 1).

    Raises:
        ValueError: The array has another shape, or values that are not finite.
    """
    if _is_pil(mask):
        from PIL import Image

        from ldm.io.images import in_8_bits

        image = in_8_bits(mask, mask.format)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
        return np.asarray(image.convert("L")) >= 128
    array = _as_array(mask)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise ValueError(f"a mask has the shape (H, W), (1, H, W) or (H, W, 1), got {array.shape}")
    if array.dtype == bool:
        return array
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("the mask has values that are not finite; give values in [0, 1]")
        return array >= 0.5
    return array >= (128 if array.max(initial=0) > 1 else 1)


def as_labels(label_map: ImageLike) -> np.ndarray:
    """Return a label map as (H, W) int64: the values of a grey or palette image, or of an integer array.

    Raises:
        ValueError: It is a colour image, or an array of another shape or type.
    """
    if _is_pil(label_map):
        from ldm.io.label_maps import LABEL_MODES, without_alpha

        image = without_alpha(label_map)
        if image.mode not in LABEL_MODES:
            raise ValueError(f"a label map is a grey or palette image, got one of the mode {image.mode}")
        label_map = image
    array = _as_array(label_map)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iub":
        raise ValueError(f"a label map has integer values of the shape (H, W), got {array.dtype} {array.shape}")
    return array.astype(np.int64)


def _as_array(image: Any) -> np.ndarray:
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        return image.numpy()
    return np.asarray(image)


def _is_pil(image: Any) -> TypeGuard[Image]:
    return hasattr(image, "getbands")


def broadcast(values: Any, count: int, name: str) -> list[Any]:
    """Return one value for each of `count` images: the values given, or one value repeated.

    Raises:
        ValueError: There are several values, but not `count`.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        return [values] * count
    values = list(values)
    if len(values) == 1:
        return values * count
    if len(values) != count:
        raise ValueError(f"{count} images and {len(values)} {name} do not match; give one for each, or one for all")
    return values
