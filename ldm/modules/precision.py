"""Precision of computations: the dtypes that precision names select on a device."""

from __future__ import annotations

import logging

import torch

from ldm.config.values import PRECISIONS
from ldm.errors import UserError

logger = logging.getLogger(__name__)

# CPU instructions that multiply bfloat16, as named by `torch.cpu.get_capabilities`. Without one, torch's kernels
# convert every value and take dozens of times as long as in float32.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
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
