"""Text to image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

from ldm.config.model_info import ModelInfo
from ldm.pipelines.pipeline import Conditioned, SamplerPipeline, check_guidance, check_sides, image_size, latent_size

if TYPE_CHECKING:
    from ldm.models.diffusion.conditioning import Conditioning
    from ldm.pipelines.run import SamplerOptions

logger = logging.getLogger(__name__)


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
    scale: float = 5.0,
    **options: Unpack[SamplerOptions],
) -> list[Any]:
    """Sample an image for each prompt, with classifier-free guidance (arXiv:2207.12598).

    Args:
        model: a text-to-image model, see `ldm.load`.
        prompts: one text, or one for each image.
        negative_prompt: text whose content guidance suppresses.
        height, width: image size in pixels, multiples of what the model needs; default: the size of the model.
        steps: number of sampler steps.
        scale: guidance scale; 1 samples without guidance. The bundled model works best with 2 or 3.
        **options: `seed`, `sampler`, `eta`, `batch_size`, `latents`, `output_type`, `progress`, `callback`, `device`,
            `precision`; see `ldm.pipelines.run.SamplerOptions`.

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
    pipeline = TextToImage(
        negative_prompt=negative_prompt, height=height, width=width, steps=steps, scale=scale, **sampler
    )
    warn_unknown_words(model, [*prompts, negative_prompt])
    return run(pipeline, model, prompts, **rest)


def text_conditioning(
    model: Any, prompts: Sequence[str], scale: float, negative_prompt: str = ""
) -> tuple[Conditioning, Conditioning]:
    """Return the conditional and the unconditional conditioning of prompts; the latter is None without guidance."""
    negative = len(prompts) * [negative_prompt]
    uncond = model.get_learned_conditioning(negative) if scale != 1.0 else None
    return model.get_learned_conditioning(list(prompts)), uncond


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
