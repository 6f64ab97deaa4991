"""Image and text to image (SDEdit, arXiv:2108.01073)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_count, check_guidance
from ldm.pipelines.text import text_conditioning, warn_prompts

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import SamplerOptions

SCALES = {1: 5.0, 2: 9.0}  # by the version of Stable Diffusion, as published
EVEN_GRIDS = ("exact", "uniform")


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
        published_start: start as the published script of Stable Diffusion. It takes the first int(strength × steps)
            timesteps of the grid, and noises the image to the next one. Otherwise the timesteps below this share of the
            model's are taken, and the image is noised to the last of them.
        height, width: size that images are cropped and resized to; None keeps their own.
    """

    scale: float = 5.0
    negative_prompt: str = ""
    strength: float = 0.75
    published_start: bool = False
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
        if self.published_start:
            return max(1, int(self.strength * self.steps))
        if self.timestep_spacing == "trailing":
            end = round(self.strength * timesteps, 6)
            return max(1, sum(round(i * timesteps / self.steps) - 1 < end for i in range(1, self.steps + 1)))
        return math.ceil(round(self.steps * self.strength, 6))

    def condition(self, model: Any, requests: Sequence[ImagePrompt]) -> Conditioned:
        """See `Pipeline.condition`."""
        from ldm.io.pixels import pad_to_multiple, to_batch
        from ldm.pipelines.sampling import encode

        multiple = model.downsampling * model.model.diffusion_model.downsampling
        latents = encode(model, to_batch([pad_to_multiple(each.image, multiple) for each in requests]))
        prompts = [each.prompt for each in requests]
        cond, uncond = text_conditioning(model, prompts, self.scale, self.negative_prompt)
        height, width = latents.shape[2:]
        size = (height, width)
        if self.published_start:
            t_enc = self.count_steps(requests[0], model.num_timesteps)
            return Conditioned(size, cond, uncond, x0=latents, t_enc=t_enc)
        return Conditioned(size, cond, uncond, x0=latents, strength=self.strength)

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
    scale: float | None = None,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample from images and prompts: each image is noised part of the way and denoised to its prompt.

    Args:
        model: a text-to-image model.
        images: PIL images, arrays or tensors of any size; see `ldm.pipelines.inputs.as_pixels`.
        prompts: one for all images, or one for each.
        strength: share of the steps that are sampled, above 0 and at most 1: a low value stays close to the image. For
            Stable Diffusion it is rounded to steps as published, see `start_settings`.
        negative_prompt: text whose content guidance suppresses.
        height, width: size to crop and resize the images to; default: their own.
        steps: number of sampler steps that strength 1 takes.
        scale: guidance scale; 1 samples without guidance. Default: 9 for Stable Diffusion 2, 5 for other models.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is not conditioned on text, or an option is out of range.
    """
    from ldm.pipelines.inputs import as_list, as_pixels, broadcast
    from ldm.pipelines.run import run, split_options

    info = ModelInfo.of(model)
    sampler, rest = split_options(options)
    settings = {"steps": steps, "scale": scale, **sampler}
    if scale is None:
        settings |= {"scale": ImageToImage.scale, **published_settings(info)}
    pipeline = ImageToImage(
        strength=strength,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        **{**settings, **start_settings(info, settings)},
    )
    pixels = [pipeline.fit(as_pixels(image)) for image in as_list(images)]
    if len(pixels) == 1 and not isinstance(prompts, str):
        pixels = pixels * len(prompts)
    texts = broadcast(prompts, len(pixels), "prompts")
    warn_prompts(model, texts, negative_prompt)
    return run(pipeline, model, [ImagePrompt(*each) for each in zip(pixels, texts, strict=True)], **rest)


def published_settings(info: ModelInfo) -> dict[str, Any]:
    """Return the guidance scale of the published script for Stable Diffusion; nothing for other models."""
    return {} if info.stable_diffusion is None else {"scale": SCALES[info.stable_diffusion]}


def start_settings(info: ModelInfo, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the published start for Stable Diffusion, or nothing if it does not apply.

    The published start takes int(strength × steps) timesteps of the even grid of DDIM and PLMS. Without a grid of its
    own, a run takes the "uniform" one, which is published, or "exact" where that exceeds the model's timesteps.

    Args:
        info: facts about the model.
        settings: settings of the sampler.
    """
    sampler, steps = settings.get("sampler", ImageToImage.sampler), settings["steps"]
    spacing = settings.get("timestep_spacing") or info.params.get("timestep_spacing")
    if info.stable_diffusion is None or sampler not in ("ddim", "plms") or spacing not in (None, *EVEN_GRIDS):
        return {}
    stride = info.timesteps // steps if isinstance(steps, int) and 0 < steps <= info.timesteps else 1
    fits = (info.timesteps - 1) % stride > 0
    return {"published_start": True, "timestep_spacing": spacing or ("uniform" if fits else "exact")}
