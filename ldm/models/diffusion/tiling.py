"""Running a network over overlapping tiles of a large map and blending the results.

Published as `split_input_params` of a latent diffusion model: a dict with

    ks, stride               (h, w) of a tile and of the step between tiles
    vqf                      factor between the map that the tiles are cut from and the result, for the first stage
    patch_distributed_vq     tile the first stage, too
    clip_min_weight, clip_max_weight           bounds of the weight that a pixel has in the blend
    tie_braker               weigh whole tiles as well, by their distance from the map's edge
    clip_min_tie_weight, clip_max_tie_weight   bounds of that weight

A pixel weighs as much as it is far from its tile's border, so that seams vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.nn import functional as F

from ldm.errors import UserError, did_you_mean
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

KEYS = (
    "ks", "stride", "vqf", "patch_distributed_vq", "tie_braker", "clip_min_weight", "clip_max_weight",
    "clip_min_tie_weight", "clip_max_tie_weight",
)  # fmt: skip


def check_params(params: Mapping[str, Any]) -> None:
    """Refuse what `tiled` cannot use.

    Raises:
        UserError: an unknown key, or `ks` or `stride` that are no pairs of positive numbers.
    """
    for key in params:
        if key not in KEYS:
            raise UserError(f'split_input_params has an unknown key "{key}"{did_you_mean(str(key), KEYS)}')
    for key in ("ks", "stride"):
        pair = params.get(key)
        if not isinstance(pair, Sequence) or len(pair) != 2 or min(pair) < 1:
            raise UserError(f"split_input_params.{key} must be two positive numbers, e.g. [128, 128], not {pair}")


def tiled(
    function: Callable[..., torch.Tensor],
    maps: Sequence[torch.Tensor],
    params: Mapping[str, Any],
    factor: Fraction | int = 1,
) -> torch.Tensor:
    """Blend `function(*tiles)` over tiles of the maps.

    Args:
        function: takes the same tile of every map, (B, C_i, kh, kw), and gives (B, C, kh · factor, kw · factor).
        maps: (B, C_i, H, W) each.
        params: as in this module's docstring; tiles larger than the map shrink to it.
        factor: size of a result over size of its tile.

    Returns:
        (B, C, H · factor, W · factor).

    Raises:
        UserError: the tiles do not cover the map evenly.
    """
    height, width = maps[0].shape[2:]
    kernel = (min(params["ks"][0], height), min(params["ks"][1], width))
    stride = (min(params["stride"][0], height), min(params["stride"][1], width))
    counts = [(size - k) // s + 1 for size, k, s in zip((height, width), kernel, stride, strict=True)]
    if any((size - k) % s for size, k, s in zip((height, width), kernel, stride, strict=True)):
        raise UserError(
            f"tiles of {kernel} with stride {stride} do not cover a map of {(height, width)}; choose others"
        )
    # (B, C, kh, kw, tiles)
    cut = [F.unfold(x, kernel, stride=stride).unflatten(1, (x.shape[1], *kernel)) for x in maps]
    results = [function(*(tiles[..., i] for tiles in cut)) for i in range(counts[0] * counts[1])]

    scaled = [tuple(_times(n, factor) for n in pair) for pair in (kernel, stride, (height, width))]
    weights = tile_weights(scaled[0], counts, params).to(results[0])
    stacked = torch.stack(results, dim=-1) * weights
    fold = torch.nn.Fold(output_size=scaled[2], kernel_size=scaled[0], stride=scaled[1])
    total = fold(weights.flatten(0, 1)[None])
    return fold(stacked.flatten(1, 3)) / total


def tiled_encode(encode: Callable[[torch.Tensor], Any], x: torch.Tensor, params: Mapping[str, Any]) -> Any:
    """What a first stage's `encode` says of pictures (B, 3, H, W): latents, or one posterior of blended moments."""
    moments: list[bool] = []

    def parts(tile: torch.Tensor) -> torch.Tensor:
        encoded = encode(tile)
        moments.append(isinstance(encoded, DiagonalGaussianDistribution))
        return encoded.parameters if moments[-1] else encoded

    blended = tiled(parts, [x], params, Fraction(1, params["vqf"]))
    return DiagonalGaussianDistribution(blended) if moments[0] else blended


def tiled_predict(
    network: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    cond: Mapping[str, list[torch.Tensor]],
    params: Mapping[str, Any],
) -> torch.Tensor:
    """The prediction of `DiffusionWrapper` for x (B, C, H, W); `c_concat` is cut like x, the rest serves every tile."""
    whole = {key: value for key, value in cond.items() if key != "c_concat"}

    def predict(tile: torch.Tensor, *joined: torch.Tensor) -> torch.Tensor:
        return network(tile, t, **whole, **({"c_concat": list(joined)} if joined else {}))

    return tiled(predict, [x, *cond.get("c_concat", [])], params)


def tile_weights(kernel: Sequence[int], counts: Sequence[int], params: Mapping[str, Any]) -> torch.Tensor:
    """Weights (kh, kw, tiles) of the pixels of every tile, for `counts` (rows, columns) of tiles."""
    inside = border_distance(*kernel).clamp(params["clip_min_weight"], params["clip_max_weight"])
    weights = inside[..., None].repeat(1, 1, counts[0] * counts[1])
    if params.get("tie_braker"):
        among = border_distance(*counts).clamp(params["clip_min_tie_weight"], params["clip_max_tie_weight"])
        weights = weights * among.flatten()
    return weights


def border_distance(h: int, w: int) -> torch.Tensor:
    """(h, w): distance of every position from the nearest edge, as a share of the side, from 0 to 0.5."""
    y, x = (torch.arange(n) / max(n - 1, 1) for n in (h, w))
    y, x = torch.minimum(y, 1 - y), torch.minimum(x, 1 - x)
    return torch.minimum(y[:, None], x[None, :])


def _times(n: int, factor: Fraction | int) -> int:
    scaled = n * Fraction(factor)
    if scaled.denominator != 1:
        raise UserError(f"a tile side of {n} is not divisible by {Fraction(factor).denominator}; choose another")
    return int(scaled)
