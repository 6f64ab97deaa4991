"""Layer helpers shared by the networks, the timestep embedding, and re-exports of the noise schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from einops import repeat
from torch import Tensor, nn

from ldm.compat import published_names
from ldm.config.instantiate import instantiate_from_config

# The published code defines the functions of the noise schedule in this module.
from ldm.modules.diffusionmodules.schedule import (
    betas_for_alpha_bar,
    extract_into_tensor,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)

__all__ = [
    "GroupNorm32",
    "HybridConditioner",
    "SiLU",
    "avg_pool_nd",
    "betas_for_alpha_bar",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]

__getattr__ = published_names(__name__)

M = TypeVar("M", bound=nn.Module)

SiLU = nn.SiLU

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that accumulates in float32 for every input dtype, as torch's implementation does."""


def normalization(channels: int) -> GroupNorm32:
    """Return the normalisation layer of the U-Nets: 32 groups, eps 1e-5."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a 1-, 2- or 3-dimensional convolution."""
    return _by_dims(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a 1-, 2- or 3-dimensional average pooling layer."""
    return _by_dims(_AVERAGE_POOLS, dims)(*args, **kwargs)


def _by_dims(classes: Mapping[int, Callable[..., nn.Module]], dims: int) -> Callable[..., nn.Module]:
    if dims not in classes:
        raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
    return classes[dims]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Return a fully connected layer."""
    return nn.Linear(*args, **kwargs)


@torch.no_grad()
def zero_module(module: M) -> M:
    """Set every parameter of `module` to zero and return it; a residual block that ends with it is the identity."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


@torch.no_grad()
def scale_module(module: M, scale: float) -> M:
    """Multiply every parameter of `module` by `scale` and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:
    """Return the mean over all dimensions except the first: (B, ...) -> (B,)."""
    return tensor.mean(dim=tuple(range(1, tensor.dim())))


def checkpoint(
    func: Callable[..., Tensor], inputs: tuple[Any, ...], params: Iterable[nn.Parameter], flag: bool
) -> Tensor:
    """Return `func(*inputs)`; with `flag` the backward pass recomputes the activations instead of storing them.

    There is no overhead without gradients. The argument `params` is part of the published signature and not used,
    because torch's non-reentrant checkpointing finds the parameters of `func` itself.
    """
    if not (flag and torch.is_grad_enabled()):
        return func(*inputs)
    from torch.utils.checkpoint import checkpoint as recompute_in_backward

    return recompute_in_backward(func, *inputs, use_reentrant=False)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Return the sinusoidal embedding of timesteps (arXiv:1706.03762, section 3.5): (B,) -> (B, dim) in float32.

    The first half holds cosines and the second half sines, with frequencies from 1 down to 1 / `max_period`. The last
    entry of an odd `dim` is zero. Timesteps may be fractional. With `repeat_only` the timestep is repeated `dim` times.
    """
    if repeat_only:
        return repeat(timesteps, "b -> b d", d=dim)
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


class HybridConditioner(nn.Module):
    """Pair of conditioners: one for concatenation with the image channels and one for cross-attention."""

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        """Return the conditioning dict of `DiffusionWrapper` with the conditioning key "hybrid"."""
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }
