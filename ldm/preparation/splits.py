"""Split of images into training and validation."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

MOST_VALIDATION = 2000  # images; more make each validation slower and hardly more precise


def split(
    groups: Sequence[str], fraction: float, classes: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Return the indices of the images for training and for validation.

    The hash of a group decides, so that the split depends on the images alone. All images of a group are on one side.

    Args:
        groups: group of each image; copies of an image have the same one.
        fraction: share of the images for validation; at least one, unless it is 0.
        classes: class of each image, each of which keeps an image for training.
    """
    count = len(groups)
    wanted = min(max(1, round(fraction * count)), MOST_VALIDATION, count - 1) if fraction > 0 else 0
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    labels = list(classes) if classes is not None else [None] * count
    remaining = Counter(labels)
    chosen: set[int] = set()
    for group in sorted(members, key=_rank):
        indices = members[group]
        if len(chosen) + len(indices) > wanted:
            continue
        taken = Counter(labels[index] for index in indices)
        if all(remaining[label] > number for label, number in taken.items()):
            remaining -= taken
            chosen.update(indices)
    return [index for index in range(count) if index not in chosen], sorted(chosen)


def _rank(group: str) -> str:
    return hashlib.sha256(group.encode(errors="surrogateescape")).hexdigest()
