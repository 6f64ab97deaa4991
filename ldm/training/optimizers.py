"""Optimizers that step through memory once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

FUSED_DEVICES = ("cpu", "cuda")


def fused(kind: type[Adam], parameters: Sequence[nn.Parameter], **options: Any) -> Adam:
    """An Adam or AdamW that runs fused: one pass for all its operations, instead of one for each.

    On devices without such a kernel it runs as torch chooses. Three habits of torch are undone:

    - A fused optimizer says that it divides gradients by float16 training's scale itself, and Lightning then refuses
      to clip them, even in bfloat16, which has no scale. Here the scaler divides, as it does for any other optimizer.
    - Loading a state replaces the choice by that of the file. Here it stays, whatever wrote the file.
    - The kernel for the CPU takes it for granted that the state lies in memory as its parameter does, and reads other
      elements where it does not. A loaded state is laid out like its parameter. (Gradients are, by autograd.)

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
    optimizer.register_load_state_dict_post_hook(_lay_out)
    return optimizer


def _stay_fused(optimizer: Adam, state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _lay_out(optimizer: Adam) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
