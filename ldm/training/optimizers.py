"""Fused optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

FUSED_DEVICES = ("cpu", "cuda")


def fused(kind: type[Adam], parameters: Sequence[nn.Parameter], **options: Any) -> Adam:
    """Create a fused Adam or AdamW, which updates all its tensors in one pass over memory.

    On devices without a fused kernel, PyTorch chooses the implementation. Three defaults of PyTorch are changed:

    - A fused optimizer announces that it unscales float16 gradients itself, and Lightning then refuses to clip them,
      even in bfloat16, which needs no scaling. Here the gradient scaler unscales, as for any other optimizer.
    - Loading a state replaces the implementation by that of the file. Here the optimizer stays fused.
    - The CPU kernel assumes that a state has the memory layout of its parameter, and otherwise reads other elements.
      Here a loaded state is copied to the layout of its parameter. (Autograd does so for gradients.)

    Args:
        kind: `Adam` or `AdamW`.
        parameters: the parameters to train, on their final device.
        options: arguments of `kind`, such as `lr` and `betas`.
    """
    if not all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters):
        return kind(parameters, **options)
    optimizer = kind(parameters, fused=True, **options)
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    optimizer.register_load_state_dict_post_hook(_match_layout)
    return optimizer


def _keep_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _match_layout(optimizer: Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
