"""Count of the memory that tensors hold, on any device and also for fake tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """Counter of the bytes of live storages, now and at their peak. A view shares the storage of its base."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the results of operations in the block; `peak` starts from the live bytes."""
        add = self.add

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for leaf in tree_leaves(result):
                    if isinstance(leaf, torch.Tensor):
                        add(leaf)
                return result

        self.peak = self.live
        with Watch():
            yield
