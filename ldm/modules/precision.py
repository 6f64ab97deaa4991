"""Precision of computations: the dtypes that precision names select, and computations that leave their range."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ldm.config.values import PRECISIONS
from ldm.errors import UserError
from ldm.modules.packing import plain_weights

logger = logging.getLogger(__name__)

# CPU instructions that multiply bfloat16, as named by `torch.cpu.get_capabilities`. Without one, torch's kernels
# convert every value and take dozens of times as long as in float32.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
HALF_PRECISIONS = (torch.float16, torch.bfloat16)
BFLOAT16_TRAINING = {"bf16-mixed", "bf16", "bf16-true"}  # Lightning's precisions that compute in bfloat16


def computes_bfloat16(device: torch.device | str) -> bool:
    """Return whether `device` multiplies bfloat16 in hardware, where bfloat16 is faster than float32."""
    device_type = torch.device(device).type
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.10 has no public name for it


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype for sampling; "auto" is bfloat16 if the hardware of `device` supports it, else float32.

    Raises:
        UserError: The name is unknown.
    """
    if name not in PRECISIONS:
        raise UserError(f'there is no precision "{name}"; choose one of {", ".join(PRECISIONS)}')
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    if name == "bfloat16":
        _warn_if_emulated(device)
    return getattr(torch, name)


def choose_training_precision(name: str | int, device: torch.device | str) -> str | int:
    """Return Lightning's name of the training precision.

    The name "auto" becomes "bf16-mixed" if the hardware of `device` supports bfloat16, else "32-true". Any other name
    is returned unchanged.
    """
    if name == "auto":
        name = "bf16-mixed" if computes_bfloat16(device) else "32-true"
        logger.info("precision auto: %s", name)
    elif name in BFLOAT16_TRAINING:
        _warn_if_emulated(device)
    return name


def _warn_if_emulated(device: torch.device | str) -> None:
    if torch.device(device).type == "cpu" and not computes_bfloat16(device):
        logger.warning("this CPU has no bfloat16 instructions: bfloat16 is many times slower than float32 on it")


def check_range(weights: nn.Module | Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raise an error if a weight, of a module or a state dict, would become infinite in `dtype`.

    Raises:
        UserError: A finite value is too large.
    """
    for name, weight in weights.named_parameters() if isinstance(weights, nn.Module) else weights.items():
        if dtype not in HALF_PRECISIONS or weight.dtype in (dtype, torch.float16) or weight.numel() == 0:
            continue
        extremes = torch.stack(weight.detach().aminmax())
        if (extremes.isfinite() & ~extremes.to(dtype).isfinite()).any():
            largest = float(extremes.abs().max())
            raise UserError(
                f'the weight "{name}" has a value of {largest:.6g}, too large for {dtype_name(dtype)}; '
                "use the precision float32 or bfloat16"
            )


def finite_items(x: Tensor) -> Tensor:
    """Return (B,) bool: True for each item of `x` (B, …) without NaN and infinite values."""
    return x.isfinite().flatten(1).all(dim=1)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the module, such as "float16"."""
    return str(dtype).removeprefix("torch.")


_overflowed: WeakSet[nn.Module] = WeakSet()  # modules whose overflow was logged


def retry_in_float32(
    module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, result: Tensor | None = None
) -> Tensor:
    """Return `function(x)`; items that overflow in half precision are computed again in float32.

    The weights of `module` are float32 in the meantime, and the same objects with the same bits afterwards. The first
    overflow of a module is logged. Items that are not finite in `x` are not computed again, nor are results that need
    gradients.

    Args:
        module: the weights that `function` uses.
        function: maps floating-point tensors (B, …) to floating-point tensors (B, …), each item on its own.
        x: (B, …).
        result: `function(x)` if it is known.

    Returns:
        The result in the dtype of `function(x)`; values beyond its range are clamped to it.
    """
    result = function(x) if result is None else result
    half = _half_precision(module, x)
    if half is None or result.requires_grad:
        return result
    overflowed = finite_items(x) & ~finite_items(result)
    if not overflowed.any():
        return result
    if module not in _overflowed:
        _overflowed.add(module)
        logger.warning("the first stage overflows in %s; images that overflow are computed again in float32", half)
    with torch.no_grad(), in_float32(module), torch.autocast(x.device.type, enabled=False):
        again = function(x.float())  # all items, because rounding depends on the size of the batch
    limits = torch.finfo(result.dtype)
    again = again.clamp(limits.min, limits.max).to(result.dtype)
    return torch.where(overflowed.view(-1, *[1] * (result.dim() - 1)), again, result)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Compute with float32 copies of the weights of `module`; afterwards they are as before, packed weights too."""
    with plain_weights(module):
        tensors = [*module.parameters(), *module.buffers()]
        originals = [tensor.data for tensor in tensors]
        try:
            for tensor, original in zip(tensors, originals, strict=True):
                if original.dtype in HALF_PRECISIONS:
                    tensor.data = original.float()
            yield
        finally:
            for tensor, original in zip(tensors, originals, strict=True):
                tensor.data = original


def _half_precision(module: nn.Module, x: Tensor) -> str | None:
    """Return the name of the half precision in which `module` computes on `x`; None if it uses another."""
    device, dtype = x.device.type, next((parameter.dtype for parameter in module.parameters()), None)
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype_name(dtype) if dtype in HALF_PRECISIONS and device != "meta" else None
