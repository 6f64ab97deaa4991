"""Images with masked parts, to train inpainting models.

Shapes: images (H, W, 3) float32 in [-1, 1]; masks (H, W, 1) float32, 1 in the masked part and -1 elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.config.instantiate import instantiate_from_config
from ldm.data.image_files import plain_entries
from ldm.data.masks import MAX_COVERAGE, find_masks, random_mask

__all__ = ["MAX_COVERAGE", "ItemMasks", "MaskedPictures", "masked", "random_mask"]


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `image` with black in the masked part."""
    return np.where(mask > 0, np.float32(-1.0), image)


class ItemMasks:
    """Masks for the items of a data set.

    Args:
        kind: see `ldm.data.masks.find_masks`.
        fixed: derive each mask from the index of the item, for validation; otherwise PyTorch's global generator
            determines the masks.

    Raises:
        UserError: the kind is unknown.
    """

    def __init__(self, kind: str, fixed: bool) -> None:
        self.kind, self.fixed = kind, fixed
        find_masks(kind)

    def add(self, item: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return an item with `mask`, and with `masked_image`, its `image` with black in the masked part."""
        seed = index if self.fixed else int(torch.randint(2**31, ()))
        height, width = item["image"].shape[:2]
        mask = find_masks(self.kind)(height, width, np.random.default_rng(seed))
        return {**item, "mask": mask, "masked_image": masked(item["image"], mask)}


class MaskedPictures(Dataset):
    """Wrapper that adds a random mask to each item of a data set, for models with `cond_stage_key: masked_image`.

    Items: `image`, texts and numbers of the wrapped data set, `mask`, and `masked_image`, the image with black in the
    masked part. PyTorch's global generator determines the masks.

    Args:
        dataset: `target` and `params` of the wrapped data set.
        fixed: derive each mask from the index of the item instead, for validation.
        masks: "random", brush strokes or boxes; "thin", "medium" or "thick", as in LaMa; "box"; or "half", one half
            of the image. See `ldm.data.masks`.

    Raises:
        UserError: there are no such masks.
    """

    def __init__(self, dataset: Mapping[str, Any], fixed: bool = False, masks: str = "random") -> None:
        self.masks = ItemMasks(masks, fixed)
        self.dataset = instantiate_from_config(dataset)

    @property
    def fixed(self) -> bool:
        """Return whether each mask is derived from the index of its item."""
        return self.masks.fixed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.masks.add(plain_entries(self.dataset[index]), index)
