"""Which numbers to compute in: what the names of precisions mean on the device at hand."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

# Instructions of a CPU that multiply bfloat16, by the names of `torch.cpu.get_capabilities`; without one, torch's
# kernels convert number by number and take dozens of times as long as in float32.
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
TRAINING = {"bf16-mixed", "bf16", "bf16-true"}  # Lightning's names of what computes in bfloat16


def computes_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 in hardware, so that it is the faster choice there."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.10 has no public name for it


def choose_precision(name: str, device: torch.device | str) -> torch.dtype:
    """The type of numbers for sampling: `auto` is bfloat16 where the device computes in it, else float32."""
    if name == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    if name == "bfloat16":
        _warn_if_emulated(device)
    return getattr(torch, name)


def choose_training_precision(name: str | int, device: torch.device | str) -> str | int:
    """Lightning's name of the precision for training: `auto` is `bf16-mixed` where the device computes in bfloat16,
    else `32-true`; any other name stays.
    """
    if name == "auto":
        name = "bf16-mixed" if computes_bfloat16(device) else "32-true"
        logger.info("precision auto: %s", name)
    elif name in TRAINING:
        _warn_if_emulated(device)
    return name


def _warn_if_emulated(device: torch.device | str) -> None:
    if torch.device(device).type == "cpu" and not computes_bfloat16(device):
        logger.warning("this CPU has no bfloat16 instructions: bfloat16 takes many times as long as float32 here")
