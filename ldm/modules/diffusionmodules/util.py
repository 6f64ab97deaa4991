"""Layer helpers shared by the networks, the timestep embedding, and the published home of the schedule's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.config.instantiate import instantiate_from_config

# Compatibility names: the published code keeps the noise schedule's functions in this module.
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

M = TypeVar("M", bound=nn.Module)

SiLU = nn.SiLU

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that sums in float32 whatever the dtype of its input (torch does so by itself)."""


def normalization(channels: int) -> GroupNorm32:
    """The normalisation layer of the U-Nets: 32 groups, eps 1e-5."""
    return GroupNorm32(32, channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution."""
    return _by_dims(_CONVOLUTIONS, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional average pooling."""
    return _by_dims(_AVERAGE_POOLS, dims)(*args, **kwargs)


def _by_dims(classes: Mapping[int, Callable[..., nn.Module]], dims: int) -> Callable[..., nn.Module]:
    if dims not in classes:
        raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
    return classes[dims]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A fully connected layer."""
    return nn.Linear(*args, **kwargs)


@torch.no_grad()
def zero_module(module: M) -> M:
    """Set every parameter of `module` to zero; a residual branch that ends in it starts as the identity."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


@torch.no_grad()
def scale_module(module: M, scale: float) -> M:
    """Multiply every parameter of `module` by `scale`."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the first: `(B, ...) -> (B,)`."""
    return tensor.mean(dim=tuple(range(1, tensor.dim())))


def checkpoint(
    func: Callable[..., Tensor], inputs: tuple[Any, ...], params: Iterable[nn.Parameter], flag: bool
) -> Tensor:
    """`func(*inputs)`; with `flag` its activations are computed again in the backward pass instead of stored.

    Costs nothing while gradients are off. `params` belongs to the published signature: torch's
    non-reentrant checkpointing finds the parameters that `func` uses by itself.
    """
    if not (flag and torch.is_grad_enabled()):
        return func(*inputs)
    from torch.utils.checkpoint import checkpoint as recompute_in_backward

    return recompute_in_backward(func, *inputs, use_reentrant=False)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding of timesteps (arXiv:1706.03762, section 3.5): `(B,) -> (B, dim)` in float32.

    The first half holds cosines, the second sines, of frequencies from 1 down to 1/`max_period`;
    an odd `dim` ends in a zero. Timesteps may be fractional. `repeat_only` repeats the raw
    timestep `dim` times instead.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(embedding, (0, dim % 2))


class HybridConditioner(nn.Module):
    """Two conditioners side by side: one whose output joins the image channels, one for cross-attention."""

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        """The conditioning dict that `DiffusionWrapper` takes for the key "hybrid"."""
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }
