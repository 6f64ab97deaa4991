"""Convert between pixels and tensors: value ranges, sizes and batches.

Shapes: B images, C channels, H × W pixels. Models use float tensors in [-1, 1]; files hold uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, did_you_mean

# Far above the rounding error of float32 at 255, and far below one level: images are unchanged by load and save.
_ROUNDING = 1 / 1024


def chosen_size(size: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """Return the requested (height, width): one of them keeps the proportions of `size`, and none means `size`."""
    if height is not None:
        return height, width or max(1, round(height * size[1] / size[0]))
    if width is not None:
        return max(1, round(width * size[0] / size[1])), width
    return size


def pad_to_multiple(x: np.ndarray, multiple: int) -> np.ndarray:
    """Pad `x` (H, W, …) at the lower and right border by reflection, to sides that are multiples of `multiple`.

    Each side is at least twice `multiple`: with less, a network would normalise feature maps of a single position.
    """
    missing = [(0, max(-side % multiple, 2 * multiple - side)) for side in x.shape[:2]]
    return np.pad(x, [*missing, *[(0, 0)] * (x.ndim - 2)], mode="reflect")


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """Convert images `(H, W, 3)` uint8 of one size to `(B, 3, H, W)` float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batch_entry(batch: Mapping[str, Any], key: str) -> Any:
    """Return the entry `key` of a batch.

    Raises:
        UserError: the batch has no such entry.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f'the dataset returns a {type(batch).__name__}; return {{"{key}": …}} for each item')
    if key not in batch:
        names = [name for name in batch if isinstance(name, str)]
        raise UserError(f'the dataset returns no "{key}"{did_you_mean(key, names)}; it returns {", ".join(names)}')
    return batch[key]


def batch_integers(batch: Mapping[str, Any], key: str) -> Tensor:
    """Return the integers of a batch, such as labels or tokens, as int64; floats of a tensor are returned unchanged.

    Raises:
        UserError: the batch has no such entry, or it is not a tensor.
    """
    x = batch_entry(batch, key)
    if not isinstance(x, Tensor):
        raise UserError(f'the dataset returns a {type(x).__name__} as "{key}"; return integers')
    return x if x.is_floating_point() else x.to(torch.int64)


def batch_images(batch: Mapping[str, Any], key: str) -> Tensor:
    """Return the images of a batch, `(B, H, W, C)` or `(B, H, W)`, as contiguous float32 `(B, C, H, W)`.

    Raises:
        UserError: the batch has no such entry, or it is not a tensor.
    """
    x = batch_entry(batch, key)
    if not isinstance(x, Tensor):
        raise UserError(f'the dataset returns a {type(x).__name__} as "{key}"; return an array (H, W, C) for each item')
    x = x[..., None] if x.dim() == 3 else x
    return x.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)


def in_random_colours(maps: Tensor, colours: Tensor | None = None) -> Tensor:
    """Show maps `(B, C, H, W)` with any number of channels as images `(B, 3, H, W)` in [-1, 1].

    Args:
        maps: the maps.
        colours: `(3, C, 1, 1)`; by default fixed random ones, which leave the global generator as it is.
    """
    if colours is None:
        colours = torch.randn(3, maps.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.conv2d(maps, colours.to(maps))
    low, high = x.aminmax()
    return 2.0 * (x - low) / (high - low).clamp_min(1e-12) - 1.0


def to_uint8(x: Tensor | np.ndarray) -> np.ndarray:
    """Convert values in [-1, 1] to pixels, channels last; other values are clipped, and uint8 is returned unchanged.

    Args:
        x: `(..., C, H, W)` or `(..., H, W, C)` with C of 1, 3 or 4; if both fit, channels come first.

    Returns:
        `(..., H, W, C)` uint8. Levels are rounded down, as in the published implementation.

    Raises:
        ValueError: the shape is not that of images, or a value is not finite.
    """
    array = x.detach().float().cpu().numpy() if isinstance(x, Tensor) and x.dtype != torch.uint8 else np.asarray(x)
    if array.ndim < 3 or not {array.shape[-1], array.shape[-3]} & {1, 3, 4}:
        raise ValueError(f"images have 1, 3 or 4 channels, got the shape {array.shape}")
    if array.shape[-3] in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
    if array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise ValueError("the image has values that are not finite, which are no pixels")
        levels = (array.astype(np.float32) + 1.0) * 127.5 + _ROUNDING
        array = levels.clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array)
