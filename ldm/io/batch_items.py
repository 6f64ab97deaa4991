"""Items of a batch as messages name them: by their files, and by their values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Entries of a batch that name the files of its items, in the order in which messages prefer them.
FILE_KEYS = ("file_path_", "relative_file_path_", "relpath", "file_name", "filename", "path", "__key__")
# Number of items that a message names; it counts the others.
NAMED_ITEMS = 3


def item_names(batch: Any) -> list[str]:
    """Return the names of the files of a batch; empty if the batch does not hold them."""
    if isinstance(batch, Mapping):
        for key in FILE_KEYS:
            names = batch.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return []


def item_count(batch: Any) -> int:
    """Return the number of items of a batch: the length of its first tensor, or 1 without tensors."""
    values = batch.values() if isinstance(batch, Mapping) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


def describe_items(names: Sequence[str], positions: Sequence[int]) -> str:
    """Return the items at `positions` of a batch as text: their names, or their positions if they have no names."""
    known = all(position < len(names) for position in positions)
    words = [f'"{names[position]}"' if known else f"item {position}" for position in positions[:NAMED_ITEMS]]
    rest = len(positions) - len(words)
    return ", ".join(words) + (f" and {rest} more" if rest else "")


def finite_items(batch: Any) -> dict[str, Tensor]:
    """Return flags (B,) for each map of floats in a batch: whether all values of an item are finite.

    Maps have at least two dimensions, as images, latents and embeddings do. Numbers of an item, such as scores, are
    not checked. The flags stay on the device of the entry, so that the call does not wait for it.
    """
    if not isinstance(batch, Mapping):
        return {}
    flags = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.numel():
            low, high = torch.aminmax(value.detach().flatten(1), dim=1)  # NaN propagates, and infinity is an extreme
            flags[key] = low.isfinite() & high.isfinite()
    return flags
