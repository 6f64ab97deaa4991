"""Masked images in the form that in-painting models of Stable Diffusion read.

Shapes: images (H, W, 3) float32 in [-1, 1]; masks (H, W, 1) float32, 1 in the masked part and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm.data.image_files import plain_entries
from ldm.data.inpainting import MaskedPictures
from ldm.errors import UserError

OWN = "own"


class MaskedImages(MaskedPictures):
    """Wrapper that adds a mask to each item of a data set, for a `LatentInpaintDiffusion`.

    Items: `image`, texts and numbers of the wrapped data set, `mask`, and `masked_image`, the image with 0, which is
    grey, in the masked part.

    Args:
        dataset: `target` and `params` of the wrapped data set.
        fixed: derive each random mask from the index of the item, for validation.
        masks: "own", the `mask` in the items of the wrapped data set, which is above 0 in the masked part; or a kind of
            random masks, see `MaskedPictures`.

    Raises:
        UserError: there are no such masks.
    """

    def __init__(self, dataset: Mapping[str, Any], fixed: bool = False, masks: str = "random") -> None:
        self.has_own = masks == OWN
        super().__init__(dataset, fixed, "random" if self.has_own else masks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._with_own_mask(index) if self.has_own else super().__getitem__(index)
        mask = (item["mask"] > 0).astype(np.float32)
        return {**item, "mask": mask, "masked_image": item["image"] * (1 - mask)}

    def _with_own_mask(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        if "mask" not in item:
            raise UserError(
                f"MaskedImages: the items of {type(self.dataset).__name__} have no mask; give it one, such as with "
                'beside: {mask: "{stem}_mask.png"} of a folder, or leave out masks: own'
            )
        return {**plain_entries(item), "mask": np.asarray(item["mask"])}
