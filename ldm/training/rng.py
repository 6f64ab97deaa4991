"""States of all random number generators, in a form that safe checkpoints can contain."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch


def rng_state(devices: bool = True) -> dict[str, Any]:
    """Return the states of the generators of PyTorch, NumPy and Python, as tensors, numbers and tuples.

    Args:
        devices: include the generators of the GPUs, which the worker of a data loader must not use.
    """
    state = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    name, keys, position, has_gauss, gauss = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if devices and torch.cuda.is_available() else [],
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states from `rng_state`; those of CUDA only if the number of devices is the same."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Return a result of `rng_state` with arrays instead of tensors, which processes would send as shared memory."""
    name, keys, *rest = state["numpy"]
    return {**state, "torch": state["torch"].numpy(), "numpy": (name, keys.numpy(), *rest)}


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return the result of `rng_state` from that of `as_arrays`."""
    name, keys, *rest = state["numpy"]
    return {**state, "torch": torch.from_numpy(state["torch"]), "numpy": (name, torch.from_numpy(keys), *rest)}


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the states of all generators at the end of the block, also if it fails."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
