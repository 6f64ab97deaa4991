"""Frozen modules, whose weights training must not change."""

from __future__ import annotations

from functools import partial
from typing import Any


def disabled_train(self: Any, mode: bool = True) -> Any:
    """Return the module unchanged; replaces `train` of a frozen module, which stays in evaluation mode."""
    return self


def freeze(module: Any) -> Any:
    """Put `module` in evaluation mode permanently and disable the gradients of its parameters."""
    module.eval().requires_grad_(False)
    module.train = partial(disabled_train, module)  # unlike a bound method, it can be sent to a new process
    return module
