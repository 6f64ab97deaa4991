"""Freeze modules that training must not change."""

from __future__ import annotations

from typing import Any


def disabled_train(self: Any, mode: bool = True) -> Any:
    """Stands in for `train` on a frozen module, which must stay in evaluation mode."""
    return self


def freeze(module: Any) -> Any:
    """Put a module in evaluation mode for good, with no gradients for its parameters."""
    module.eval().requires_grad_(False)
    module.train = disabled_train.__get__(module)
    return module
