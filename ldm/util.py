"""Helpers with published names; most are defined in other modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ldm.compat import published_names
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
    "parallel_data_prefetch",  # noqa: F822
]

# These names are defined in modules that import torch, which commands do only after they have checked their options.
__getattr__ = published_names(__name__)


def exists(x: Any) -> bool:
    """Return whether `x` is not None."""
    return x is not None


def default(val: T | None, d: T | Callable[[], T]) -> T:
    """Return `val`, or the default `d` if it is None; a `d` that is a function is called."""
    if val is not None:
        return val
    return cast(T, d() if inspect.isfunction(d) else d)


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
