"""Text to image."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_guidance, check_sides, image_size, latent_size

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Conditioning
    from ldm.pipelines.run import SamplerOptions

logger = logging.getLogger(__name__)

STEPS = 50  # of Stable Diffusion, as published
SCALES = {1: 7.5, 2: 9.0}  # by the version of Stable Diffusion, as published


@dataclass(frozen=True, kw_only=True)
class TextToImage(SamplerPipeline):
    """Pipeline from prompts to images; a request is a prompt.

    Args:
        negative_prompt: text whose content guidance suppresses.
        height, width: image size in pixels; None is the size of the model.
    """

    scale: float = 5.0
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        info.check_reads_text()
        super().check(info)
        check_guidance(self.negative_prompt, self.scale)
        check_sides(info, self.height, self.width)

    def condition(self, model: Any, requests: Sequence[str]) -> Conditioned:
        """See `Pipeline.condition`."""
        cond, uncond = text_conditioning(model, requests, self.scale, self.negative_prompt)
        return Conditioned(latent_size(model, *image_size(model, self.height, self.width)), cond, uncond)


def text_to_image(
    model: Any,
    prompts: str | Sequence[str],
    *,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    steps: int = 50,
    scale: float | None = None,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample an image for each prompt, with classifier-free guidance (arXiv:2207.12598).

    Args:
        model: a text-to-image model, see `ldm.load`.
        prompts: one text, or one for each image.
        negative_prompt: text whose content guidance suppresses.
        height, width: image size in pixels, multiples of what the model needs; default: the size of the model.
        steps: number of sampler steps.
        scale: guidance scale; 1 samples without guidance. Default: 7.5 for Stable Diffusion 1, 9 for Stable Diffusion
            2, 5 for other models. The bundled model works best with 2 or 3.
        **options: `seed`, `sampler`, `eta`, `timestep_spacing`, `batch_size`, `latents`, `output_type`, `progress`,
            `callback`, `device`, `precision`; see `ldm.pipelines.run.SamplerOptions`.

    Returns:
        PIL images, or what `output_type` names.

    Raises:
        UserError: The model is not conditioned on text, or a size does not suit it.

    Example:
        >>> import ldm
        >>> model = ldm.load("emoji64")
        >>> images = ldm.text_to_image(model, ["red heart"], steps=4, scale=3, seed=1, progress=False)
        >>> images[0].size
        (64, 64)
    """
    from ldm.pipelines.run import run, split_options

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    sampler, rest = split_options(options)
    if scale is None:
        scale = published_settings(ModelInfo.of(model)).get("scale", TextToImage.scale)
    pipeline = TextToImage(
        negative_prompt=negative_prompt, height=height, width=width, steps=steps, scale=scale, **sampler
    )
    warn_prompts(model, prompts, negative_prompt)
    return run(pipeline, model, prompts, **rest)


def published_settings(info: ModelInfo) -> dict[str, Any]:
    """Return the steps and the guidance scale of the published script for Stable Diffusion; nothing for others."""
    version = info.stable_diffusion
    return {} if version is None else {"steps": STEPS, "scale": SCALES[version]}


def text_conditioning(
    model: Any, prompts: Sequence[str], scale: float, negative_prompt: str = ""
) -> tuple[Conditioning, Conditioning]:
    """Return the conditional and the unconditional conditioning of prompts; the latter is None without guidance."""
    negative = len(prompts) * [negative_prompt]
    uncond = model.get_learned_conditioning(negative) if scale != 1.0 else None
    return model.get_learned_conditioning(list(prompts)), uncond


def text_and_image_conditioning(
    model: Any, prompts: Sequence[str], scale: float, negative_prompt: str, maps: Mapping[str, Any]
) -> tuple[Conditioning, Conditioning]:
    """Return both for a model that is conditioned on images too; `maps` are the entries of the images."""
    cond, uncond = text_conditioning(model, prompts, scale, negative_prompt)
    return {**maps, "c_crossattn": [cond]}, None if uncond is None else {**maps, "c_crossattn": [uncond]}


def text_settings(
    info: ModelInfo, reads_text: bool, prompts: Sequence[str], negative_prompt: str, scale: float | None
) -> dict[str, Any]:
    """Return the settings of guidance by a text for a task that has models with and without one.

    Args:
        info: facts about the model.
        reads_text: True if the model does the task by a text.
        prompts: the prompts.
        negative_prompt: text to avoid.
        scale: guidance scale; None for that of the task.

    Raises:
        UserError: The model reads no text, and one is given.
    """
    if reads_text:
        return {"negative_prompt": negative_prompt} | ({} if scale is None else {"scale": scale})
    if any(prompts) or negative_prompt or scale is not None:
        raise UserError(
            f'the model "{info.name}" reads no text; leave out the prompt, the negative prompt and the guidance scale'
        )
    return {}


def warn_prompts(model: Any, prompts: Sequence[str], negative_prompt: str = "") -> None:
    """Log what the model does not read of the prompts and the negative prompt: unknown words, and ends that are cut."""
    from ldm.modules.encoders.truncation import warn_truncations

    warn_unknown_words(model, [*prompts, negative_prompt])
    stage = getattr(model, "cond_stage_model", None)
    warn_truncations(stage, prompts)
    warn_truncations(stage, [negative_prompt], "negative prompt")


def unknown_words(model: Any, texts: Sequence[str]) -> list[str]:
    """Return the words of `texts`, each once, that the vocabulary of the model lacks; empty if it has none."""
    tokenizer = getattr(getattr(model, "cond_stage_model", None), "tknz_fn", None)
    find = getattr(tokenizer, "unknown_words", None)
    return list(dict.fromkeys(word for text in texts for word in find(text))) if find else []


def warn_unknown_words(model: Any, texts: Sequence[str]) -> None:
    """Log the words of `texts` that the vocabulary of the model lacks."""
    unknown = unknown_words(model, texts)
    if unknown:
        logger.warning("these words are not in the vocabulary of the model: %s", ", ".join(unknown))
