"""Image and text to image (SDEdit, arXiv:2108.01073)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_count, check_guidance
from ldm.pipelines.text import text_conditioning, warn_unknown_words

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import SamplerOptions


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Request of image to image: an image (H, W, 3) uint8 to start from, and a prompt."""

    image: np.ndarray
    prompt: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageToImage(SamplerPipeline):
    """Pipeline that noises an image part of the way and denoises it to a prompt; a request is an `ImagePrompt`.

    Args:
        negative_prompt: text whose content guidance suppresses.
        strength: share of the steps that are sampled, in (0, 1]; 1 leaves almost nothing of the image.
        height, width: size that images are cropped and resized to; None keeps their own.
    """

    scale: float = 5.0
    negative_prompt: str = ""
    strength: float = 0.75
    height: int | None = None
    width: int | None = None

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        info.check_reads_text()
        super().check(info)
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_count(name, side, 1)
        check_guidance(self.negative_prompt, self.scale)
        if not 0.0 < self.strength <= 1.0:
            raise UserError(f"strength must be above 0 and at most 1, got {self.strength:g}")
        if self.sampler == "ddpm":
            raise UserError('the sampler "ddpm" takes every timestep; choose another one for image to image')

    def fit(self, image: np.ndarray) -> np.ndarray:
        """Return the image in the size of the settings; its centre if the proportions differ."""
        import numpy as np
        from PIL import Image, ImageOps

        from ldm.io.pixels import chosen_size

        own = image.shape[:2]
        height, width = chosen_size(own, self.height, self.width)
        if (height, width) == own:
            return image
        return np.asarray(ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS))

    def batch_key(self, request: ImagePrompt) -> tuple[int, ...]:
        """Return the image size."""
        return request.image.shape

    def count_steps(self, request: ImagePrompt, timesteps: int) -> int:
        """Return the number of steps that the strength leaves of an even grid."""
        return math.ceil(round(self.steps * self.strength, 6))

    def condition(self, model: Any, requests: Sequence[ImagePrompt]) -> Conditioned:
        """See `Pipeline.condition`."""
        from ldm.io.pixels import pad_to_multiple, to_batch
        from ldm.pipelines.sampling import encode

        multiple = model.downsampling * model.model.diffusion_model.downsampling
        latents = encode(model, to_batch([pad_to_multiple(each.image, multiple) for each in requests]))
        prompts = [each.prompt for each in requests]
        cond, uncond = text_conditioning(model, prompts, self.scale, self.negative_prompt)
        return Conditioned(tuple(latents.shape[2:]), cond, uncond, x0=latents, strength=self.strength)

    def finish(self, requests: Sequence[ImagePrompt], images: np.ndarray) -> np.ndarray:
        """Return the images without their padding."""
        height, width, _ = requests[0].image.shape
        return images[:, :height, :width]


def image_to_image(
    model: Any,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str] = "",
    *,
    strength: float = 0.75,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    scale: float = 5.0,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample from images and prompts: each image is noised part of the way and denoised to its prompt.

    Args:
        model: a text-to-image model.
        images: PIL images, arrays or tensors of any size; see `ldm.pipelines.inputs.as_pixels`.
        prompts: one for all images, or one for each.
        strength: share of the steps that are sampled, above 0 and at most 1: a low value stays close to the image.
        negative_prompt: text whose content guidance suppresses.
        height, width: size to crop and resize the images to; default: their own.
        steps: number of sampler steps that strength 1 takes.
        scale: guidance scale; 1 samples without guidance.
        **options: `seed`, `sampler`, `eta`, `batch_size`, `latents`, `output_type`, `progress`, `callback`, `device`,
            `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is not conditioned on text, or an option is out of range.
    """
    from ldm.pipelines.inputs import as_list, as_pixels, broadcast
    from ldm.pipelines.run import run, split_options

    sampler, rest = split_options(options)
    pipeline = ImageToImage(
        strength=strength,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        steps=steps,
        scale=scale,
        **sampler,
    )
    pixels = [pipeline.fit(as_pixels(image)) for image in as_list(images)]
    if len(pixels) == 1 and not isinstance(prompts, str):
        pixels = pixels * len(prompts)
    texts = broadcast(prompts, len(pixels), "prompts")
    warn_unknown_words(model, [*texts, negative_prompt])
    return run(pipeline, model, [ImagePrompt(*each) for each in zip(pixels, texts, strict=True)], **rest)
