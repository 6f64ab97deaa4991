"""Sample latents, encode images and decode latents: what all pipelines share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError, did_you_mean, is_out_of_memory
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.noise import SeededNoise
from ldm.modules.attention import cached_contexts
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.packing import packed_weights
from ldm.modules.tiles import in_tiles

logger = logging.getLogger(__name__)
ANCESTRAL = "ddpm"  # the name of the sampler that takes every step of the model
DECODING_TILES = (64, 32, 16)  # sides of the tiles to decode in when a picture does not fit, in latents


@dataclass(frozen=True)
class SamplerSettings:
    """How to walk from noise to a picture."""

    sampler: str = "ddim"  # a name that `make_sampler` knows
    steps: int = 50
    eta: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> SamplerSettings:
        """The settings among those of a command."""
        return cls(**{field.name: settings[field.name] for field in fields(cls)})


def make_sampler(name: str, model: Any) -> Any:
    """The sampler called `name` for `model`: "ddim", "plms", or "dpm" (DPM-Solver++ 2M).

    Raises:
        UserError: no sampler is called so.
    """
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.dpm_solver import DPMSolverSampler
    from ldm.models.diffusion.plms import PLMSSampler

    samplers = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
    if name not in samplers:
        raise UserError(f'there is no sampler "{name}"{did_you_mean(name, samplers)}; choose {", ".join(samplers)}')
    return samplers[name](model)


@contextmanager
def prepared(model: Any) -> Iterator[None]:
    """Run with what many steps of `model` share made once: the CPU's layout of its weights, keys of its context.

    Every sampling run goes through here. A command that makes several runs enters it around all of them; entering
    again inside costs nothing. Pictures stay the same up to rounding. Inside, the model only runs: see
    `packed_weights` and `cached_contexts`. `ema_scope` goes around it, and inside is an error.

    Args:
        model: a diffusion model with its network in `model`, and a `first_stage_model` where it has one.
    """
    stage = getattr(model, "first_stage_model", None)
    with packed_weights(model.model, *(stage.children() if stage is not None else ())), cached_contexts(model.model):
        yield


@torch.no_grad()
def sample_latents(
    model: Any,
    shape: Sequence[int],
    settings: SamplerSettings,
    conditioning: Conditioning = None,
    unconditional: Conditioning = None,
    noise: Tensor | SeededNoise | None = None,
    progress: tqdm | None = None,
    **options: Any,
) -> Tensor:
    """Draw one batch of latents with the sampler that `settings` name.

    Args:
        model: a latent diffusion model.
        shape: (B, C, h, w) of the latents.
        settings: sampler, steps, eta and guidance scale; at scale 1, or without `unconditional`, nothing is guided.
            The sampler "ddpm" is the model's own, which takes all of its steps whatever the settings say.
        conditioning: what the network is told, its batch B; see `ldm.models.diffusion.conditioning`.
        unconditional: what guidance leads away from, of the same form.
        noise: where all noise comes from, or the `(B, C, h, w)` to start from; by default the global generator.
        progress: advanced by one at every step.
        **options: `strength`, and fields of `ldm.models.diffusion.sampler.SamplingOptions`, such as `mask` and `x0`.

    Returns:
        `(B, C, h, w)` float32 on the model's device.
    """
    count, *size = shape
    options |= {
        "x_T": noise if isinstance(noise, Tensor) else None,
        "noise_sampler": noise if isinstance(noise, SeededNoise) else None,
        "unconditional_guidance_scale": settings.scale,
        "unconditional_conditioning": unconditional,
        "callback": None if progress is None else lambda _: progress.update(),
        "verbose": False,
    }
    with prepared(model):
        if settings.sampler == ANCESTRAL:
            latents = model.p_sample_loop(conditioning, shape, **options)
        else:
            sampler = make_sampler(settings.sampler, model)
            latents = sampler.sample(settings.steps, count, size, conditioning, settings.eta, **options)[0]
    if not torch.isfinite(latents).all():
        logger.warning("numbers grew beyond all bounds; lower the guidance scale or eta, or compute in float32")
    return latents


@torch.no_grad()
def encode(model: Any, pictures: Tensor) -> Tensor:
    """Scaled latents `(B, C, h, w)` float32 of pictures `(B, 3, H, W)` in [-1, 1]: the likeliest, nothing is drawn."""
    weights = next(model.first_stage_model.parameters(), pictures)
    with prepared(model):
        encoded = model.encode_first_stage(pictures.to(model.device, weights.dtype))
    if isinstance(encoded, DiagonalGaussianDistribution):
        encoded = encoded.mode()
    return model.get_first_stage_encoding(encoded).float()


@torch.no_grad()
def decode(model: Any, latents: Tensor, tile: int | None = None) -> Tensor:
    """Pictures `(B, 3, H, W)` float32 in [-1, 1] on the CPU from scaled latents `(B, C, h, w)`.

    What a model of pixels has drawn are pictures already.

    Where the batch does not fit into memory it is decoded picture by picture, and a picture that does not fit in
    overlapping tiles; a line says so.

    Args:
        tile: decode larger maps in overlapping tiles of this side from the start, in latents.
    """
    if not hasattr(model, "decode_first_stage"):
        return _finished(latents)
    with prepared(model):
        if tile is not None and max(latents.shape[-2:]) > tile:
            return _decoded_tiles(model, latents, tile)
        try:
            return _finished(model.decode_first_stage(latents))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if len(latents) > 1:
            return torch.cat([decode(model, latent) for latent in latents.split(1)])
        return _decode_in_tiles(model, latents)


def _decode_in_tiles(model: Any, latents: Tensor) -> Tensor:
    for side in (side for side in DECODING_TILES if side < max(latents.shape[-2:])):
        logger.warning("decoding does not fit into memory at once; decoding tiles of %d × %d latents", side, side)
        try:
            return _decoded_tiles(model, latents, side)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise UserError("out of memory; use smaller pictures")


def _decoded_tiles(model: Any, latents: Tensor, side: int) -> Tensor:
    return in_tiles(
        lambda tile: _finished(model.decode_first_stage(tile)), latents, side, side // 4, model.downsampling
    )


def _finished(pictures: Tensor) -> Tensor:
    return pictures.float().clamp(-1.0, 1.0).cpu()


def text_to_images(
    model: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    settings: SamplerSettings,
    negative_prompt: str = "",
    noise: Tensor | SeededNoise | None = None,
    progress: tqdm | None = None,
) -> Tensor:
    """One picture for each prompt, as one batch with classifier-free guidance (arXiv:2207.12598).

    Args:
        model: a text-conditional latent diffusion model.
        prompts: B texts.
        size: (height, width) of the latents.
        settings: sampler, steps, eta and guidance scale; at scale 1 nothing is guided.
        negative_prompt: what guidance leads away from.
        noise: as in `sample_latents`.
        progress: advanced by one at every step.

    Returns:
        `(B, 3, H, W)` float32 in [-1, 1], on the CPU.
    """
    conditioning, unconditional = text_conditioning(model, prompts, settings, negative_prompt)
    shape = (len(prompts), model.channels, *size)
    with prepared(model):
        return decode(model, sample_latents(model, shape, settings, conditioning, unconditional, noise, progress))


@torch.no_grad()
def text_conditioning(
    model: Any, prompts: Sequence[str], settings: SamplerSettings, negative_prompt: str = ""
) -> tuple[Conditioning, Conditioning]:
    """What the network is told by `prompts`, and what guidance leads away from: None where nothing is guided."""
    negative = len(prompts) * [negative_prompt]
    unconditional = model.get_learned_conditioning(negative) if settings.scale != 1.0 else None
    return model.get_learned_conditioning(list(prompts)), unconditional


def unknown_words(model: Any, texts: Sequence[str]) -> list[str]:
    """The words of `texts` that the model's vocabulary lacks, each once; empty where the model cannot tell."""
    find = getattr(getattr(model.cond_stage_model, "tknz_fn", None), "unknown_words", None)
    return list(dict.fromkeys(word for text in texts for word in find(text))) if find else []
