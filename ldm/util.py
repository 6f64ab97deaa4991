"""Helpers with published names; most are defined in other modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ldm.config.instantiate import get_obj_from_str, instantiate_from_config

T = TypeVar("T")

__all__ = [
    "count_params",
    "default",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "isimage",
    "ismap",
    "log_txt_as_img",  # noqa: F822
    "mean_flat",  # noqa: F822
]

# These modules import torch, which commands do only after they have checked their options.
_LAZY = {"log_txt_as_img": "ldm.io.grids", "mean_flat": "ldm.modules.diffusionmodules.util"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def exists(x: Any) -> bool:
    """Return whether `x` is not None."""
    return x is not None


def default(value: T | None, fallback: T | Callable[[], T]) -> T:
    """Return `value`, or `fallback` if it is None; a `fallback` that is a function is called."""
    if value is not None:
        return value
    return cast(T, fallback() if inspect.isfunction(fallback) else fallback)


def ismap(x: Any) -> bool:
    """Return whether `x` is a tensor (B, C, H, W) with more than three channels."""
    return _is_tensor(x) and x.dim() == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Return whether `x` is a tensor (B, C, H, W) with one or three channels."""
    return _is_tensor(x) and x.dim() == 4 and x.shape[1] in (1, 3)


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "dim") and hasattr(x, "shape")


def count_params(model: Any, verbose: bool = False) -> int:
    """Return the number of parameters of a module, and log it if `verbose`."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        import logging

        logging.getLogger(__name__).info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total
