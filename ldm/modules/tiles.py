"""Large maps in overlapping tiles, one at a time: little memory, any size, no seams.

The published tiling of a model, `split_input_params`, is `ldm.models.diffusion.tiling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` start that cover `size`, each over at least `overlap` of the one before.

    The last one ends where the map ends; a map no larger than a tile gets one.
    """
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def tile_boxes(height: int, width: int, tile: int, overlap: int) -> Iterator[Box]:
    """The tiles of a map, row by row."""
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            yield top, left, min(tile, height), min(tile, width)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int = 1) -> Tensor:
    """`function` of overlapping tiles, blended: where tiles overlap, each fades out towards its border.

    Args:
        function: takes (B, C, h, w) and gives (B, C', h · factor, w · factor).
        x: (B, C, H, W).
        tile: side of a tile, in positions of x.
        overlap: of neighbouring tiles at least, fewer than `tile`.
        factor: size of the result over size of x.

    Returns:
        (B, C', H · factor, W · factor) float32, where the function leaves its results.
    """
    height, width = x.shape[2:]
    total = weights = None
    for top, left, h, w in tile_boxes(height, width, tile, overlap):
        result = function(x[:, :, top : top + h, left : left + w]).float()
        if total is None:
            total = result.new_zeros(*result.shape[:2], height * factor, width * factor)
            weights = result.new_zeros(height * factor, width * factor)
        weight = fade(h * factor, overlap * factor)[:, None] * fade(w * factor, overlap * factor)[None, :]
        weight = weight.to(result.device)
        part = slice(top * factor, (top + h) * factor), slice(left * factor, (left + w) * factor)
        total[:, :, part[0], part[1]] += result * weight
        weights[part] += weight
    return total / weights


def fade(size: int, overlap: int) -> Tensor:
    """Weights (size,) that rise from both ends over `overlap` positions to 1, and are nowhere 0."""
    ramp = (torch.arange(size) + 1.0) / (overlap + 1.0)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)


class TiledDenoiser:
    """A model whose network sees large maps in overlapping tiles, blended at every step; the rest is the model's own.

    All tiles share the noise and the estimates of the whole map, so that they agree where they meet (as in
    MultiDiffusion, arXiv:2302.08113).

    Args:
        model: a model with `apply_model`, conditioned on a map that is joined to its input.
        tile, overlap: as for `in_tiles`.
    """

    def __init__(self, model: Any, tile: int, overlap: int) -> None:
        self._whole, self._tile, self._overlap = model, tile, overlap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The prediction (B, C, H, W) for x_noisy (B, C, H, W) at steps t (B,), given cond (B, c, H, W)."""
        channels = x_noisy.shape[1]

        def predict(part: Tensor) -> Tensor:
            return self._whole.apply_model(part[:, :channels], t, part[:, channels:])

        return in_tiles(predict, torch.cat([x_noisy, cond], dim=1), self._tile, self._overlap)
