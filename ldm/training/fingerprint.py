"""Fingerprint of a data set: a hash that changes with its settings, its files and its items."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.training.rng import preserved_rng

PROBES = 8  # items that are read
FOLDERS = 4  # folders in which the files of relative paths are looked up
MAX_DEPTH = 12
# Strings with this form may name files. Other strings are not looked up, which can take long on a network drive.
FILE_NAME = re.compile(r"[^\n\0]{1,1000}\.[A-Za-z0-9]{1,8}")


def fingerprint(dataset: Any) -> str:
    """Return a hash of a data set.

    It covers the values that the data set holds, such as paths, captions, arrays and transforms; the size and the time
    of change of the files that these name; and some of the items, read with fixed seeds. Items that are still random
    are left out.

    Args:
        dataset: a data set with a length. Its items are read; the states of the global generators stay the same.
    """
    walk = _Walk()
    walk.visit(dataset)
    for line in _files(walk.strings):
        walk.digest.update(line.encode())
    for index in _probes(len(dataset)):
        first, second = (_item_hash(dataset, index) for _ in range(2))
        walk.digest.update(first if first == second else b"random")
    return walk.digest.hexdigest()


def _probes(size: int) -> list[int]:
    """Return up to `PROBES` indices from the first to the last item."""
    return sorted({round(index) for index in np.linspace(0, size - 1, min(size, PROBES))})


def _item_hash(dataset: Any, index: int) -> bytes:
    with preserved_rng():
        torch.manual_seed(index)
        np.random.seed(index)
        random.seed(index)
        walk = _Walk()
        walk.visit(dataset[index])
    return walk.digest.digest()


def _files(strings: dict[str, None]) -> Iterator[str]:
    """Iterate over lines with name, size and time of change of the files that strings name.

    Relative names are looked up in the current folder, then in the folders that other strings name.
    """
    folders = [text for text in strings if not FILE_NAME.fullmatch(text) and text and os.path.isdir(text)][:FOLDERS]
    seen: set[str] = set()
    for text in strings:
        if not FILE_NAME.fullmatch(text):
            continue
        paths = [text, *(os.path.join(folder, text) for folder in folders if not os.path.isabs(text))]
        if any(path in seen for path in paths):
            continue
        for path in paths:
            try:
                status = os.stat(path)
            except (OSError, ValueError):
                continue
            seen.add(path)
            yield f"{path} {status.st_size} {status.st_mtime_ns}\n"
            break


class _Walk:
    """Walk over the values that an object holds.

    Attributes:
        digest: hash of the values.
        strings: the strings and paths among them, in order.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.strings: dict[str, None] = {}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id stays unique while its object exists

    def visit(self, value: Any, depth: int = 0) -> None:
        """Add a value and everything that it holds."""
        if isinstance(value, str | PurePath):
            text = str(value)
            self.strings.setdefault(text)
            self._add("text", text)
        elif value is None or isinstance(value, bool | int | float | complex | bytes | np.number):
            self._add(type(value).__name__, repr(value))
        elif isinstance(value, np.ndarray) and value.dtype.kind == "O":
            self.visit(value.tolist(), depth)
        elif isinstance(value, np.ndarray):
            self._add("array", f"{value.dtype} {value.shape}")
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Tensor):
            self._add("tensor", f"{value.dtype} {tuple(value.shape)}")
            self.digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif depth < MAX_DEPTH and id(value) not in self._seen:
            self._seen.add(id(value))
            self._alive.append(value)
            self._visit_parts(value, depth + 1)

    def _visit_parts(self, value: Any, depth: int) -> None:
        if isinstance(value, list | tuple):
            self._add("list", str(len(value)))
            parts: Any = value
        elif isinstance(value, set | frozenset):
            self._add("set", str(len(value)))
            parts = sorted(map(str, value))
        elif isinstance(value, Mapping):
            self._add("mapping", str(len(value)))
            parts = [part for pair in value.items() for part in pair]
        elif isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
        elif isinstance(value, MethodType):
            parts = [value.__func__, value.__self__]
        elif isinstance(value, type | FunctionType):
            self._add("name", f"{value.__module__}.{value.__qualname__}")
            parts = []
        elif isinstance(value, ModuleType | logging.Logger):  # they refer to the whole program
            self._add("name", getattr(value, "__name__", "logger"))
            parts = []
        else:
            self._add("object", f"{type(value).__module__}.{type(value).__qualname__}")
            parts = [part for pair in sorted(getattr(value, "__dict__", {}).items()) for part in pair]
        for part in parts:
            self.visit(part, depth)

    def _add(self, kind: str, text: str) -> None:
        self.digest.update(f"{kind}:{len(text)}:{text};".encode("utf-8", "surrogatepass"))
