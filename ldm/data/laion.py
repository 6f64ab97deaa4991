"""Steps that complete samples of shards for in-painting, upscaling and colouring, as in Stable Diffusion's training.

A configuration names them as `postprocess`. They read the image (H, W, 3) float32 in [-1, 1] of a sample. All
randomness comes from PyTorch's global generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.compat import published_names
from ldm.data.masks import MASKS, find_masks
from ldm.data.synthetic_masks import MASK_MODES, synthetic_mask
from ldm.errors import UserError, did_you_mean
from ldm.modules.image_degradation import degradation_fn_bsr_light
from ldm.modules.image_degradation.ops import resize

__getattr__ = published_names(__name__)

Sample = dict[str, Any]


class AddMask:
    """Step that adds `mask` (H, W, 1), 1 where the image is to be filled and else 0, and `masked_image`.

    The masked image has 0, the middle grey, under the mask, as `ldm.models.diffusion.ddpm.LatentInpaintDiffusion`
    needs it.

    Args:
        mode: kind of masks: "512train", "512train-large", "256train" or "256narrow", or one of `ldm.data.masks`.
        p_drop: probability of a mask that covers the whole image.
        image_key: entry of the image.

    Raises:
        UserError: the mode is unknown, or `p_drop` is not a probability.
    """

    def __init__(self, mode: str = "512train", p_drop: float = 0.0, image_key: str = "jpg") -> None:
        known = (*MASK_MODES, *MASKS)
        if mode not in known:
            hint = did_you_mean(mode, known)
            raise UserError(f'AddMask: there is no mode "{mode}"{hint}; choose one of {", ".join(known)}')
        if not 0 <= p_drop <= 1:
            raise UserError(f"AddMask: p_drop must be a probability from 0 to 1, not {p_drop}")
        self.mode, self.p_drop, self.image_key = mode, p_drop, image_key

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample with a mask and the masked image."""
        image: Tensor = sample[self.image_key]
        random = np.random.default_rng(int(torch.randint(2**62, ())))
        mask = self._mask(image.shape[0], image.shape[1], random)
        if random.random() < self.p_drop:
            mask = np.ones_like(mask)
        sample["mask"] = torch.from_numpy(mask)
        sample["masked_image"] = image * (sample["mask"] < 0.5)
        return sample

    def _mask(self, height: int, width: int, random: np.random.Generator) -> np.ndarray:
        if self.mode in MASK_MODES:
            return synthetic_mask(height, width, MASK_MODES[self.mode], random)[..., None]
        return (find_masks(self.mode)(height, width, random) > 0).astype(np.float32)


class AddLR:
    """Step that adds `lr`, a degraded version (output_size, output_size, 3) of the image, by BSRGAN's light recipe.

    Args:
        factor: factor of the degradation, which makes the image as many times smaller.
        output_size: side of `lr`, to which the degraded image is resized.
        initial_size: side to which the image is resized before; None keeps its size.
        image_key: entry of the image.
    """

    def __init__(self, factor: int, output_size: int, initial_size: int | None = None, image_key: str = "jpg") -> None:
        self.factor, self.output_size, self.initial_size = factor, output_size, initial_size
        self.image_key = image_key

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample with `lr`."""
        image: Tensor = sample[self.image_key]
        pixels = ((image + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        if self.initial_size is not None:
            pixels = resize(pixels, (self.initial_size, self.initial_size), "bicubic")
        pixels = degradation_fn_bsr_light(pixels, sf=self.factor)["image"]
        pixels = resize(pixels, (self.output_size, self.output_size), "bicubic")
        sample["lr"] = torch.from_numpy(pixels) / 127.5 - 1.0
        return sample


class AddBW:
    """Step that adds `lr`, the image in grey (H, W, 3) with random weights of its three colours.

    Args:
        image_key: entry of the image.
    """

    def __init__(self, image_key: str = "jpg") -> None:
        self.image_key = image_key

    def __call__(self, sample: Sample) -> Sample:
        """Return the sample with `lr`."""
        image: Tensor = sample[self.image_key]
        weights = torch.rand(3)
        grey = torch.einsum("hwc,c->hw", image, weights / weights.sum())
        sample["lr"] = grey.unsqueeze(-1).tile(1, 1, 3)
        return sample
