"""Convert between pixels and tensors: value ranges, sizes and batches.

Shapes: B images, C channels, H × W pixels. Models use float tensors in [-1, 1]; files hold uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    pass

# Far above float32's error at 255 and far below one level: pictures survive reading and writing unchanged.
_ROUNDING = 1 / 1024


def chosen_size(size: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) that was asked for; where one was not, it keeps the proportions of `size`, else `size` itself."""
    if height is None and width is None:
        return size
    if height is None:
        return max(1, round(width * size[0] / size[1])), width
    return height, width or max(1, round(height * size[1] / size[0]))


def pad_to_multiple(x: np.ndarray, multiple: int) -> np.ndarray:
    """`x` (H, W, …), mirrored at its lower and right border until both sides are multiples of `multiple`.

    Two of it at least: of a single one a network would normalise maps of one position.
    """
    missing = [(0, max(-side % multiple, 2 * multiple - side)) for side in x.shape[:2]]
    return np.pad(x, [*missing, *[(0, 0)] * (x.ndim - 2)], mode="reflect")


def to_batch(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures `(H, W, 3)` uint8 of one size as `(B, 3, H, W)` float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def batch_entry(batch: Mapping[str, Any], key: str) -> Any:
    """Entry `key` of a batch.

    Raises:
        UserError: the data set gives no such entry.
    """
    if key not in batch:
        raise UserError(f'the dataset gives no "{key}"{did_you_mean(key, batch)}; it gives {", ".join(batch)}')
    return batch[key]


def batch_images(batch: Mapping[str, Any], key: str) -> Tensor:
    """Pictures of a batch, `(B, H, W, C)` or `(B, H, W)`, as contiguous float32 `(B, C, H, W)`.

    Raises:
        UserError: the data set gives no such entry.
    """
    x = batch_entry(batch, key)
    x = x[..., None] if x.dim() == 3 else x
    return x.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)


def in_random_colours(maps: Tensor, colours: Tensor | None = None) -> Tensor:
    """Maps `(B, C, H, W)` with any number of channels as pictures `(B, 3, H, W)` in [-1, 1].

    Args:
        colours: `(3, C, 1, 1)`; by default random ones, the same each time, that take nothing from the global seed.
    """
    if colours is None:
        colours = torch.randn(3, maps.shape[1], 1, 1, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.conv2d(maps, colours.to(maps))
    low, high = x.aminmax()
    return 2.0 * (x - low) / (high - low).clamp_min(1e-12) - 1.0


def to_uint8(x: Tensor | np.ndarray) -> np.ndarray:
    """Turn values in [-1, 1] into pixels, channels last; out-of-range values are clipped, uint8 passes unchanged.

    Args:
        x: `(..., C, H, W)` or `(..., H, W, C)` with C of 1, 3 or 4; where both readings fit, channels come first.

    Returns:
        `(..., H, W, C)` uint8. Levels are rounded down, as in the published pictures.
    """
    array = x.detach().float().cpu().numpy() if isinstance(x, Tensor) and x.dtype != torch.uint8 else np.asarray(x)
    if array.ndim < 3 or not {array.shape[-1], array.shape[-3]} & {1, 3, 4}:
        raise ValueError(f"pictures have 1, 3 or 4 channels, got the shape {array.shape}")
    if array.shape[-3] in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
    if array.dtype != np.uint8:
        levels = (array.astype(np.float32) + 1.0) * 127.5 + _ROUNDING
        array = np.nan_to_num(levels).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(array)
