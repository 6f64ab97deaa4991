"""Published functions and layers that the networks of this package do not use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.util import timestep_embedding

# The entry of a conditioning for each conditioning key.
__conditioning_keys__ = {"concat": "c_concat", "crossattn": "c_crossattn", "adm": "y"}

# The attention of this package is memory-efficient already.
MemoryEfficientCrossAttention = CrossAttention


def exists(val: Any) -> bool:
    """Return whether `val` is not None."""
    return val is not None


def uniq(arr: Iterable[Any]) -> Iterable[Any]:
    """Return the distinct elements of `arr` in their order."""
    return dict.fromkeys(arr).keys()


def uniform_on_device(r1: float, r2: float, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Return uniform random numbers between `r1` and `r2`."""
    return (r1 - r2) * torch.rand(*shape, device=device) + r2


def max_neg_value(t: Tensor) -> float:
    """Return the most negative number of the dtype of `t`, which masks scores of attention."""
    return -torch.finfo(t.dtype).max


def init_(tensor: Tensor) -> Tensor:
    """Fill a weight with uniform numbers of variance 1 / (3 d), with d its last dimension, and return it."""
    bound = tensor.shape[-1] ** -0.5
    return nn.init.uniform_(tensor, -bound, bound)


class Timestep(nn.Module):
    """Sinusoidal embedding of timesteps as a layer: (B,) -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.dim)


def convert_module_to_f16(x: nn.Module) -> None:
    """Convert the weights of a convolution or linear layer to float16, for `Module.apply`."""
    _convert(x, torch.float16)


def convert_module_to_f32(x: nn.Module) -> None:
    """Convert the weights of a convolution or linear layer to float32, for `Module.apply`."""
    _convert(x, torch.float32)


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        module.to(dtype)


class CheckpointFunction(torch.autograd.Function):
    """Function that stores its inputs instead of its activations, and computes them again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], length: int, *args: Any) -> Any:
        """Return `run_function(*args[:length])`; the other arguments are the parameters that it uses."""
        ctx.run_function = run_function
        ctx.input_tensors, ctx.input_params = list(args[:length]), list(args[length:])
        with torch.no_grad():
            return run_function(*ctx.input_tensors)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        """Return the gradients of the inputs and parameters; those of the first two arguments are None."""
        inputs = [x.detach().requires_grad_() if _is_real(x) else x for x in ctx.input_tensors]
        with torch.enable_grad():
            # The function may change its inputs in place, which leaves that require gradients forbid.
            outputs = ctx.run_function(*(x.view_as(x) if isinstance(x, Tensor) else x for x in inputs))
        arguments = [*inputs, *ctx.input_params]
        wanted = [x for x in arguments if _needs_gradient(x)]
        found = iter(torch.autograd.grad(outputs, wanted, output_grads, allow_unused=True))
        return None, None, *(next(found) if _needs_gradient(x) else None for x in arguments)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _needs_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad
