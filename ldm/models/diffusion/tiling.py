"""Tiled processing: run a network on overlapping tiles of a large map and blend the results.

The parameters are published as `split_input_params` of a latent diffusion model, a dict with

    ks, stride               (h, w) of a tile and of the distance between tiles
    vqf                      downsampling factor of the first stage
    patch_distributed_vq     process the first stage in tiles, too
    clip_min_weight, clip_max_weight           bounds of the weight of a pixel in the blend
    tie_braker               also weight whole tiles, by their distance from the border of the map
    clip_min_tie_weight, clip_max_tie_weight   bounds of the weight of a tile

The weight of a pixel grows with its distance from the border of its tile, which hides the seams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from einops import rearrange, repeat
from torch.nn import functional as F

from ldm.errors import UserError, did_you_mean
from ldm.models.diffusion.attributes import is_overridden
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

KEYS = (
    "ks", "stride", "vqf", "patch_distributed_vq", "tie_braker", "clip_min_weight", "clip_max_weight",
    "clip_min_tie_weight", "clip_max_tie_weight",
)  # fmt: skip


def check_params(params: Mapping[str, Any]) -> None:
    """Check the parameters of tiled processing.

    Raises:
        UserError: an unknown key, or `ks` or `stride` is not a pair of positive numbers.
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
    """Apply `function` to tiles of the maps and blend the results.

    Args:
        function: takes the same tile of every map, (B, C_i, kh, kw); returns (B, C, kh · factor, kw · factor).
        maps: inputs (B, C_i, H, W) of the same size.
        params: see the docstring of this module; tiles larger than the map are cropped to it.
        factor: size of a result divided by the size of its tile.

    Returns:
        (B, C, H · factor, W · factor).

    Raises:
        UserError: the tiles do not cover the map evenly.
    """
    height, width = maps[0].shape[2:]
    kernel = (min(params["ks"][0], height), min(params["ks"][1], width))
    stride = (min(params["stride"][0], height), min(params["stride"][1], width))
    rows, columns = ((size - k) // s + 1 for size, k, s in zip((height, width), kernel, stride, strict=True))
    if any((size - k) % s for size, k, s in zip((height, width), kernel, stride, strict=True)):
        raise UserError(
            f"tiles of {kernel} with stride {stride} do not cover a map of {(height, width)}; choose others"
        )
    tiles = [
        rearrange(F.unfold(x, kernel, stride=stride), "b (c kh kw) n -> n b c kh kw", kh=kernel[0], kw=kernel[1])
        for x in maps
    ]
    results = [function(*parts) for parts in zip(*tiles, strict=True)]

    kernel, stride, size = (_scaled(pair, factor) for pair in (kernel, stride, (height, width)))
    weights = tile_weights(kernel, (rows, columns), params).to(results[0])
    fold = torch.nn.Fold(output_size=size, kernel_size=kernel, stride=stride)
    weighted = torch.stack(results, dim=-1) * weights
    total = fold(rearrange(weights, "kh kw n -> 1 (kh kw) n"))
    return fold(rearrange(weighted, "b c kh kw n -> b (c kh kw) n")) / total


class TilingMethods:
    """Published methods of tiled processing, for programs that cut maps into tiles themselves.

    `tiled` computes the same and does not call them.
    """

    split_input_params: Mapping[str, Any]
    apply_model: Callable[..., Any]
    tiling_methods = ("meshgrid", "delta_border", "get_weighting", "get_fold_unfold")

    def check_tiling(self) -> None:
        """Raise UserError if a subclass overrides one of these methods, and tiled processing would not call it."""
        for name in self.tiling_methods:
            if is_overridden(getattr(self, name)) and not is_overridden(self.apply_model):
                raise UserError(
                    f"{type(self).__name__}.{name} is never called by tiled processing; override apply_model, or leave "
                    "out split_input_params"
                )

    def meshgrid(self, h: int, w: int) -> torch.Tensor:
        """Return the row and the column of every pixel, (h, w, 2) int64."""
        return torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)

    def delta_border(self, h: int, w: int) -> torch.Tensor:
        """Return the distance (h, w) of every pixel from the nearest border; see `border_distance`."""
        return border_distance(h, w)

    def get_weighting(self, h: int, w: int, Ly: int, Lx: int, device: torch.device | str) -> torch.Tensor:
        """Return the weights (1, h · w, Ly · Lx) of the pixels of Ly x Lx tiles of h x w pixels."""
        weights = tile_weights((h, w), (Ly, Lx), self.split_input_params)
        return rearrange(weights, "h w n -> 1 (h w) n").to(device)

    def get_fold_unfold(
        self, x: torch.Tensor, kernel_size: Sequence[int], stride: Sequence[int], uf: int = 1, df: int = 1
    ) -> tuple[torch.nn.Fold, torch.nn.Unfold, torch.Tensor, torch.Tensor]:
        """Return what cuts a map x (B, C, H, W) into tiles, and what puts results of another size together.

        Args:
            x: the map.
            kernel_size, stride: size of a tile, and distance between tiles.
            uf, df: factor, and divisor, of the size of a result; one of them is 1.

        Returns:
            The layer of the results, the layer of the tiles, the sum of the weights (1, 1, H', W'), and the weights of
            the pixels (1, 1, kh', kw', tiles).
        """
        if uf > 1 and df > 1:
            raise NotImplementedError("a tile cannot be enlarged and reduced")
        (height, width), scale = x.shape[2:], Fraction(uf, df)
        counts = [(side - k) // s + 1 for side, k, s in zip((height, width), kernel_size, stride, strict=True)]
        kernel, step, size = ([int(n * scale) for n in pair] for pair in (kernel_size, stride, (height, width)))
        unfold = torch.nn.Unfold(kernel_size=tuple(kernel_size), stride=tuple(stride))
        fold = torch.nn.Fold(output_size=tuple(size), kernel_size=tuple(kernel), stride=tuple(step))
        weighting = self.get_weighting(kernel[0], kernel[1], counts[0], counts[1], x.device).to(x.dtype)
        normalization = fold(weighting).view(1, 1, *size)
        return fold, unfold, normalization, weighting.view(1, 1, *kernel, -1)


def tiled_encode(encode: Callable[[torch.Tensor], Any], x: torch.Tensor, params: Mapping[str, Any]) -> Any:
    """Encode images (B, 3, H, W) in tiles; return latents, or one posterior of the blended moments."""
    is_posterior: list[bool] = []

    def encode_tile(tile: torch.Tensor) -> torch.Tensor:
        encoded = encode(tile)
        is_posterior.append(isinstance(encoded, DiagonalGaussianDistribution))
        return encoded.parameters if is_posterior[-1] else encoded

    blended = tiled(encode_tile, [x], params, Fraction(1, params["vqf"]))
    return DiagonalGaussianDistribution(blended) if is_posterior[0] else blended


def tiled_predict(
    network: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    cond: Mapping[str, list[torch.Tensor]],
    params: Mapping[str, Any],
) -> torch.Tensor:
    """Return the prediction of a `DiffusionWrapper` for x (B, C, H, W), computed in tiles.

    The maps `c_concat` are cut into the same tiles as x. All tiles share the other conditioning.
    """
    shared = {key: value for key, value in cond.items() if key != "c_concat"}

    def predict(tile: torch.Tensor, *c_concat: torch.Tensor) -> torch.Tensor:
        return network(tile, t, **shared, **({"c_concat": list(c_concat)} if c_concat else {}))

    return tiled(predict, [x, *cond.get("c_concat", [])], params)


def tile_weights(kernel: Sequence[int], counts: Sequence[int], params: Mapping[str, Any]) -> torch.Tensor:
    """Return the weights (kh, kw, tiles) of the pixels of every tile, for `counts` (rows, columns) of tiles."""
    pixel_weights = border_distance(*kernel).clamp(params["clip_min_weight"], params["clip_max_weight"])
    weights = repeat(pixel_weights, "kh kw -> kh kw n", n=counts[0] * counts[1])
    if params.get("tie_braker"):
        distances = border_distance(*counts).clamp(params["clip_min_tie_weight"], params["clip_max_tie_weight"])
        weights = weights * rearrange(distances, "rows columns -> (rows columns)")
    return weights


def border_distance(h: int, w: int) -> torch.Tensor:
    """Return the distance (h, w) of every pixel from the nearest border, as a share of the side, from 0 to 0.5."""
    y, x = (torch.arange(n) / max(n - 1, 1) for n in (h, w))
    y, x = torch.minimum(y, 1 - y), torch.minimum(x, 1 - x)
    return torch.minimum(y[:, None], x[None, :])


def _scaled(pair: tuple[int, int], factor: Fraction | int) -> tuple[int, int]:
    return _scale(pair[0], factor), _scale(pair[1], factor)


def _scale(n: int, factor: Fraction | int) -> int:
    scaled = n * Fraction(factor)
    if scaled.denominator != 1:
        raise UserError(f"a tile side of {n} is not divisible by {Fraction(factor).denominator}; choose another size")
    return int(scaled)
