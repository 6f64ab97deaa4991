"""Super-resolution: an image with several times as many pixels a side (arXiv:2112.10752, section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.models.diffusion.batch_keys import LOW_RESOLUTION_KEY
from ldm.pipelines.pipeline import Conditioned
from ldm.pipelines.text import text_settings, warn_prompts
from ldm.pipelines.tiled import TiledPipeline

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.pipelines.inputs import ImageLike
    from ldm.pipelines.run import RunOptions


@dataclass(frozen=True, kw_only=True)
class SuperResolution(TiledPipeline):
    """Pipeline that enlarges images; the model determines the factor. A request is an image (H, W, 3) uint8.

    Args:
        factor: pixels of the result over pixels of the request, a side; see `upscaling_factor`.
        tile: side in pixels, in the result, of the overlapping tiles that larger images are sampled in; 0 for none.
    """

    decoding_tile: ClassVar[int | None] = 128

    steps: int = 100
    eta: float = 1.0
    factor: int = 4

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        own = upscaling_factor(info)
        super().check(info)
        if self.factor != own:
            raise UserError(f'the model "{info.name}" enlarges {own} times, not {self.factor} times')

    def batch_key(self, request: np.ndarray) -> tuple[int, ...]:
        """Return the image size."""
        return request.shape

    def condition(self, model: Any, requests: Sequence[np.ndarray]) -> Conditioned:
        """See `Pipeline.condition`."""
        cond = model.get_learned_conditioning(self.padded(model, requests).to(model.dtype))
        return Conditioned(tuple(cond.shape[2:]), cond, tile=self.latent_tile(model))

    def padded(self, model: Any, images: Sequence[np.ndarray]) -> Tensor:
        """Return images (B, 3, h, w) float32 in [-1, 1], in a size that suits the model."""
        from ldm.io.pixels import pad_to_multiple, to_batch

        multiple = model.downsampling * model.model.diffusion_model.downsampling // self.factor
        return to_batch([pad_to_multiple(image, multiple) for image in images]).to(model.device)

    def finish(self, requests: Sequence[np.ndarray], images: np.ndarray) -> np.ndarray:
        """Return the images without their padding."""
        height, width = (self.factor * side for side in requests[0].shape[:2])
        return images[:, :height, :width]


def super_resolve(
    model: Any,
    images: ImageLike | Sequence[ImageLike],
    prompts: str | Sequence[str] = "",
    *,
    negative_prompt: str = "",
    scale: float | None = None,
    noise_level: int | None = None,
    tile: int | None = None,
    steps: int | None = None,
    sampler: str = "ddim",
    eta: float | None = None,
    timestep_spacing: str | None = None,
    **options: Unpack[RunOptions],
) -> list[Any]:
    """Enlarge images, typically four times a side, and sample the details that they lack.

    Args:
        model: a super-resolution model, such as `ldm.load("emoji64-superres")`.
        images: PIL images, arrays or tensors of any size.
        prompts: one for all images, or one for each, for a model that enlarges images by a text.
        negative_prompt: text whose content guidance suppresses, for such a model.
        scale: guidance scale of such a model; default: 9.
        noise_level: noise that such a model adds to the small image, as a timestep; default: 20.
        tile: side in pixels, in the result, of the overlapping tiles that larger images are sampled in; 0 samples them
            whole. Default: the size that the model was trained on.
        steps: number of sampler steps; default: 100, by a text 50.
        sampler: "ddim", "plms", "dpm" or "ddpm".
        eta: noise of a DDIM step; default: 1 for DDIM, by a text 0; and 0 for the other samplers.
        timestep_spacing: see `ldm.pipelines.run.SamplerOptions`.
        **options: `seed`, `batch_size`, `latents`, `output_type`, `progress`, `callback`, `device` and `precision`; see
            `ldm.pipelines.run.RunOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model does not enlarge images, the tile or the noise level does not suit it, or it reads no
            prompts.
    """
    from ldm.pipelines.image import ImagePrompt
    from ldm.pipelines.inputs import as_list, as_pixels, broadcast
    from ldm.pipelines.run import run

    info = ModelInfo.of(model)
    defaults = {"steps": SuperResolution.steps, "eta": SuperResolution.eta, **published_settings(info)}
    if eta is None:
        eta = defaults["eta"] if sampler == "ddim" else 0.0
    settings = {
        "sampler": sampler,
        "steps": defaults["steps"] if steps is None else steps,
        "eta": eta,
        "timestep_spacing": timestep_spacing,
        "factor": upscaling_factor(info),
        "tile": default_tile(info) if tile is None else tile,
    }
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    pipeline = super_resolution_pipeline(info, settings, texts, negative_prompt, scale, noise_level)
    pixels = [as_pixels(image) for image in as_list(images)]
    if not info.enlarges_by_text:
        return run(pipeline, model, pixels, **options)
    if len(pixels) == 1:
        pixels = pixels * len(texts)
    texts = broadcast(texts, len(pixels), "prompts")
    warn_prompts(model, texts, negative_prompt)
    return run(pipeline, model, [ImagePrompt(*each) for each in zip(pixels, texts, strict=True)], **options)


def super_resolution_pipeline(
    info: ModelInfo,
    settings: Mapping[str, Any],
    prompts: Sequence[str],
    negative_prompt: str,
    scale: float | None,
    noise_level: int | None,
) -> SuperResolution:
    """Return the pipeline of a model: a `TextSuperResolution` if it enlarges images by a text.

    Args:
        info: facts about the model.
        settings: settings of both pipelines.
        prompts, negative_prompt, scale, noise_level: see `super_resolve`.

    Raises:
        UserError: The model reads no text or adds no noise, and one is given.
    """
    from ldm.pipelines.text_super_resolution import NOISE_LEVEL, TextSuperResolution, highest_noise_level

    text = text_settings(info, info.enlarges_by_text, prompts, negative_prompt, scale)
    if info.enlarges_by_text:
        level = min(NOISE_LEVEL, highest_noise_level(info)) if noise_level is None else noise_level
        return TextSuperResolution(**settings, **text, noise_level=level)
    if noise_level is not None:
        raise UserError(f'the model "{info.name}" adds no noise to its images; leave out the noise level')
    return SuperResolution(**settings)


def published_settings(info: ModelInfo) -> dict[str, Any]:
    """Return the steps and eta of the published upscaler by a text; nothing for other models."""
    from ldm.pipelines.text_super_resolution import TextSuperResolution

    own = {"steps": TextSuperResolution.steps, "eta": TextSuperResolution.eta}
    return own if info.enlarges_by_text else {}


def default_tile(info: ModelInfo) -> int:
    """Return the size that the model was trained on, in pixels."""
    return max(info.size.height, info.size.width)


def upscaling_factor(info: ModelInfo) -> int:
    """Return how many times a model enlarges: pixels of a latent over those of the small image at its position.

    Raises:
        UserError: The model does not enlarge images, or its conditioning stage is unknown.
    """
    if info.enlarges_by_text:
        return info.size.factor
    info.check_condition(LOW_RESOLUTION_KEY, "a super-resolution")
    stage: Any = info.params.get("cond_stage_config")
    target = stage.get("target") if isinstance(stage, Mapping) else stage
    if target not in ("torch.nn.Identity", "torch.nn.PixelUnshuffle"):
        raise UserError(
            f'the model "{info.name}" encodes small images with "{target}", so its upscaling factor is unknown; '
            "its cond_stage_config must be torch.nn.Identity or torch.nn.PixelUnshuffle"
        )
    pixels = 1 if target == "torch.nn.Identity" else int(stage["params"]["downscale_factor"])
    return info.size.factor // pixels
