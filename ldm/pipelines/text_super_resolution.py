"""Super-resolution by a text, with the upscaler of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import Conditioned, check_count, check_guidance
from ldm.pipelines.super_resolution import SuperResolution
from ldm.pipelines.text import text_and_image_conditioning

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.pipeline import NoiseSource

NOISE_LEVEL = 20  # as published


@dataclass(frozen=True, kw_only=True)
class TextSuperResolution(SuperResolution):
    """Pipeline that adds noise to images and enlarges them by their prompts. A request is an `ImagePrompt`.

    Args:
        scale: guidance scale; 1 samples without guidance.
        negative_prompt: text whose content guidance suppresses.
        noise_level: timestep of the noise that is added to the small image: more of it leaves more to the prompt.
    """

    steps: int = 50
    eta: float = 0.0
    scale: float = 9.0
    negative_prompt: str = ""
    noise_level: int = NOISE_LEVEL

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        info.check_enlarges_by_text()
        super().check(info)
        check_guidance(self.negative_prompt, self.scale)
        check_count("noise_level", self.noise_level)
        highest = highest_noise_level(info)
        if self.noise_level > highest:
            raise UserError(f"noise_level {self.noise_level} is too high for this model; give {highest} or less")

    def batch_key(self, request: Any) -> tuple[int, ...]:
        """Return the image size."""
        return super().batch_key(request.image)

    def condition_with_noise(self, model: Any, requests: Sequence[Any], noise: NoiseSource) -> Conditioned:
        """See `SamplerPipeline.condition_with_noise`."""
        return self.condition(model, requests, noise)

    def condition(self, model: Any, requests: Sequence[Any], noise: NoiseSource | None = None) -> Conditioned:
        """Return the text, and beside it the small image with noise and the level of the noise.

        Args:
            model: an upscaler.
            requests: of type `ImagePrompt`.
            noise: source of the noise; by default the global generator.
        """
        import torch

        images = self.padded(model, [each.image for each in requests])
        levels = torch.full((len(images),), self.noise_level, device=images.device)
        added = None if noise is None else noise(images.shape)
        noisy, levels = model.low_scale_model(images, levels, added)
        maps = {"c_concat": [noisy.to(model.dtype)], "c_adm": levels}
        prompts = [each.prompt for each in requests]
        cond, uncond = text_and_image_conditioning(model, prompts, self.scale, self.negative_prompt, maps)
        height, width = images.shape[2:]
        return Conditioned((height, width), cond, uncond, tile=self.latent_tile(model))

    def finish(self, requests: Sequence[Any], images: np.ndarray) -> np.ndarray:
        """Return the images without their padding."""
        return super().finish([each.image for each in requests], images)


def highest_noise_level(info: ModelInfo) -> int:
    """Return the highest noise level of an upscaler; 0 for one that adds no noise."""
    low_scale = info.params["low_scale_config"]
    if str(low_scale.get("target")).endswith("SimpleImageConcat"):
        return 0
    return int((low_scale.get("params") or {}).get("max_noise_level", 1000))
