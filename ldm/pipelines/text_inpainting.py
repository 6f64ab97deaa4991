"""In-painting by a text, with the in-painting models of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.config.model_info import ModelInfo
from ldm.pipelines.inpainting import Inpainting, MaskedImage
from ldm.pipelines.pipeline import Conditioned, check_guidance
from ldm.pipelines.text import text_and_image_conditioning


@dataclass(frozen=True, kw_only=True)
class TextInpainting(Inpainting):
    """Pipeline that fills masked parts of images by their prompts. A request is a `MaskedImage`.

    Args:
        scale: guidance scale; 1 samples without guidance.
        negative_prompt: text whose content guidance suppresses.
    """

    scale: float = 7.5
    negative_prompt: str = ""

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        super().check(info)
        check_guidance(self.negative_prompt, self.scale)

    def check_kind(self, info: ModelInfo) -> None:
        """See `Inpainting.check_kind`."""
        info.check_fills_by_text()

    def condition(self, model: Any, requests: Sequence[MaskedImage]) -> Conditioned:
        """Return the text, and beside it the mask and the latents of the image, which is 0 under the mask."""
        import torch
        from torch.nn import functional as F

        from ldm.pipelines.sampling import encode

        image, mask = self.padded(model, requests)
        latents = encode(model, image * (mask < 0.5))
        small = F.interpolate(mask, size=latents.shape[-2:])  # nearest neighbour
        parts = [latents if key == model.masked_image_key else small for key in model.concat_keys]
        maps = {"c_concat": [torch.cat([part.to(image) for part in parts], dim=1)]}
        prompts = [each.prompt for each in requests]
        cond, uncond = text_and_image_conditioning(model, prompts, self.scale, self.negative_prompt, maps)
        height, width = latents.shape[2:]
        return Conditioned((height, width), cond, uncond, tile=self.latent_tile(model))
