"""Optimizers that step through memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Adam

FUSED_DEVICES = ("cpu", "cuda")


def fused(kind: type[Adam], parameters: Sequence[nn.Parameter], **options: Any) -> Adam:
    """An Adam or AdamW that runs fused: one pass for all its operations, instead of one for each.

    On devices without such a kernel it runs as torch chooses. Two habits of torch are undone:

    - A fused optimizer says that it divides gradients by float16 training's scale itself, and Lightning then refuses
      to clip them, even in bfloat16, which has no scale. Here the scaler divides, as it does for any other optimizer.
    - Loading a state replaces the choice by that of the file. Here it stays, whatever wrote the file.

    Args:
        kind: `Adam` or `AdamW`.
        parameters: what it trains, on their device already.
        options: arguments of `kind`, such as `lr` and `betas`.
    """
    if not all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters):
        return kind(parameters, **options)
    optimizer = kind(parameters, fused=True, **options)
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_pre_hook(_stay_fused)
    return optimizer


def _stay_fused(optimizer: Adam, state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}
