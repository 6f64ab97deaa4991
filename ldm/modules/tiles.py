"""Tiled processing of large maps: overlapping tiles run one at a time and are blended without seams.

The module `ldm.models.diffusion.tiling` implements the published option `split_input_params`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the start positions of tiles of length `tile` that cover `size` positions.

    Neighbouring tiles overlap by at least `overlap`. The last tile ends at the end of the map. A map that is not
    larger than one tile gets one tile.
    """
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def tile_boxes(height: int, width: int, tile: int, overlap: int) -> Iterator[Box]:
    """Yield the tiles of a map, row by row."""
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            yield top, left, min(tile, height), min(tile, width)


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int = 1) -> Tensor:
    """Apply `function` to overlapping tiles of `x` and blend the results; tiles fade out towards their borders.

    Args:
        function: maps (B, C, h, w) to (B, C', h · factor, w · factor).
        x: (B, C, H, W).
        tile: height and width of a tile, in positions of `x`.
        overlap: smallest overlap of neighbouring tiles, less than `tile`.
        factor: ratio of the result's size to the size of `x`.

    Returns:
        (B, C', H · factor, W · factor) float32, on the device of the function's results.
    """
    height, width = x.shape[2:]
    total = weights = torch.empty(0)  # the first result states the device and the number of channels
    for index, (top, left, h, w) in enumerate(tile_boxes(height, width, tile, overlap)):
        result = function(x[:, :, top : top + h, left : left + w]).float()
        if index == 0:
            total = result.new_zeros(*result.shape[:2], height * factor, width * factor)
            weights = result.new_zeros(height * factor, width * factor)
        weight = fade(h * factor, overlap * factor)[:, None] * fade(w * factor, overlap * factor)[None, :]
        weight = weight.to(result.device)
        rows, columns = slice(top * factor, (top + h) * factor), slice(left * factor, (left + w) * factor)
        total[:, :, rows, columns] += result * weight
        weights[rows, columns] += weight
    return total / weights


def fade(size: int, overlap: int) -> Tensor:
    """Return positive weights (size,) that rise linearly to 1 over `overlap` positions from both ends."""
    ramp = (torch.arange(size) + 1.0) / (overlap + 1.0)
    return torch.minimum(ramp, ramp.flip(0)).clamp(max=1.0)


class TiledDenoiser:
    """Wrapper of a model that runs the denoising network on overlapping tiles and blends them at every step.

    All tiles share the noise and the estimates of the full map, so they agree at their borders (as in
    MultiDiffusion, arXiv:2302.08113). All other attributes are those of the model.

    Args:
        model: model with `apply_model`, conditioned on maps that are concatenated to its input.
        tile, overlap: as for `in_tiles`.
    """

    def __init__(self, model: Any, tile: int, overlap: int) -> None:
        self._model, self._tile, self._overlap = model, tile, overlap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Tensor | Mapping[str, Any]) -> Tensor:
        """Return the prediction (B, C, H, W).

        Args:
            x_noisy: (B, C, H, W).
            t: timesteps (B,).
            cond: maps (B, c, H, W); or a dict with such maps under `c_concat`, and with entries that all tiles share.
        """
        channels = x_noisy.shape[1]
        maps = cond["c_concat"] if isinstance(cond, Mapping) else [cond]

        def predict(region: Tensor) -> Tensor:
            own = region[:, channels:]
            tile_cond = {**cond, "c_concat": [own]} if isinstance(cond, Mapping) else own
            return self._model.apply_model(region[:, :channels], t, tile_cond)

        return in_tiles(predict, torch.cat([x_noisy, *maps], dim=1), self._tile, self._overlap)
