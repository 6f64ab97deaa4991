"""Sample latents, encode images and decode latents: the steps that all pipelines share.

Shapes: images (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), scaled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, did_you_mean, is_out_of_memory
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import SamplingOptions
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.tiles import in_tiles

logger = logging.getLogger(__name__)

ANCESTRAL = "ddpm"  # the sampler that takes every timestep of the model
SAMPLER_CLASSES = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
DECODING_TILES = (64, 32, 16)  # tile sides, in latents, to try if an image does not fit into memory


def make_sampler(name: str, model: Any) -> Any:
    """Return the sampler called `name` for `model`: "ddim", "plms", or "dpm" (DPM-Solver++ 2M).

    Raises:
        UserError: There is no such sampler.
    """
    if name not in SAMPLER_CLASSES:
        near, known = did_you_mean(name, SAMPLER_CLASSES), ", ".join(SAMPLER_CLASSES)
        raise UserError(f'there is no sampler "{name}"{near}; choose {known}')
    return SAMPLER_CLASSES[name](model)


@torch.no_grad()
def sample_latents(
    model: Any,
    shape: Sequence[int],
    *,
    sampler: str = "ddim",
    steps: int = 50,
    eta: float = 0.0,
    scale: float = 1.0,
    timestep_spacing: str | None = None,
    cond: Conditioning = None,
    uncond: Conditioning = None,
    x_T: Tensor | None = None,
    noise: Callable[[Sequence[int]], Tensor] | None = None,
    on_step: Callable[[], object] | None = None,
    t_enc: int | None = None,
    **options: Any,
) -> Tensor:
    """Sample one batch of latents.

    Args:
        model: a diffusion model.
        shape: (B, C, h, w) of the latents.
        sampler: a name that `make_sampler` knows, or "ddpm", which takes every timestep of the model.
        steps: number of steps; "ddpm" ignores it.
        eta: noise of a DDIM step; 0 is deterministic.
        scale: guidance scale; at 1, or without `uncond`, sampling is not guided.
        timestep_spacing: name of the grid, see `schedule.make_ddim_timesteps`; None for that of the model, or else of
            the sampler.
        cond: conditioning of batch size B; see `ldm.models.diffusion.conditioning`.
        uncond: unconditional conditioning of the same form.
        x_T: (B, C, h, w) start noise, instead of sampled noise.
        noise: the source of all noise, such as a `SeededNoise`; by default the global generator.
        on_step: called after every step.
        t_enc: number of timesteps of the grid to sample, from the option `x0` noised to the next one.
        **options: `strength`, and fields of `SamplingOptions`, such as `mask` and `x0`.

    Returns:
        (B, C, h, w) float32 on the model's device.
    """
    options |= {
        "noise_sampler": noise,
        "unconditional_guidance_scale": scale,
        "unconditional_conditioning": uncond,
        "callback": None if on_step is None else lambda _: on_step(),
        "verbose": False,
    }
    if sampler == ANCESTRAL:
        # Not `model.p_sample_loop`: a wrapper such as `TiledDenoiser` must see every evaluation.
        grid = np.arange(model.num_timesteps)
        ancestral = AncestralSampler(model, getattr(model, "clip_denoised", False))
        return ancestral.run(shape, grid, cond, SamplingOptions(**options), x_T)[0]
    solver = make_sampler(sampler, model)
    if t_enc is not None:
        solver.make_schedule(steps, timestep_spacing, eta)
        return _sample_from(solver, shape, t_enc, cond, SamplingOptions(**options))
    count, *size = shape
    options |= {"ddim_discretize": timestep_spacing}
    return solver.sample(steps, count, size, cond, eta=eta, x_T=x_T, **options)[0]


def _sample_from(
    sampler: DDIMSampler, shape: Sequence[int], t_enc: int, cond: Conditioning, options: SamplingOptions
) -> Tensor:
    """Return samples (B, C, h, w) from `options.x0`, noised to index `t_enc` of the grid, in `t_enc` steps."""
    sampler.options = options  # the source of the noise
    noise = sampler.sample_noise(shape)
    indices = torch.full((shape[0],), t_enc, device=noise.device)
    start = sampler.stochastic_encode(options.known_latent.to(noise), indices, noise=noise)
    return sampler.run(shape, sampler.ddim_timesteps, cond, options, start, t_enc - 1)[0]


@torch.no_grad()
def encode(model: Any, images: Tensor) -> Tensor:
    """Return scaled latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1]: the mode of the posterior.

    Images that overflow in half precision are encoded again in float32; a log line says so.
    """
    weights = next(model.first_stage_model.parameters(), images)
    encoded = model.encode_first_stage(images.to(model.device, weights.dtype))
    if isinstance(encoded, DiagonalGaussianDistribution):
        encoded = encoded.mode()
    return model.get_first_stage_encoding(encoded).float()


@torch.no_grad()
def decode(model: Any, latents: Tensor, tile: int | None = None) -> Tensor:
    """Return images (B, 3, H, W) float32 in [-1, 1] on the CPU from scaled latents (B, C, h, w).

    Samples of a pixel-space model are images already. A batch that does not fit into memory is decoded image by image,
    and an image that does not fit in overlapping tiles; a log line says so. Images that overflow in half precision are
    decoded again in float32; a log line says so too. Values that are still not finite are NaN in the result, which
    `ldm.modules.precision.finite_items` finds.

    Args:
        model: a diffusion model.
        latents: scaled latents; of one image also (C, h, w), which returns (3, H, W).
        tile: decode larger maps in overlapping tiles of this side, in latents, from the start.
    """
    if latents.dim() == 3:
        return decode(model, latents[None], tile)[0]
    if not hasattr(model, "decode_first_stage"):
        return clamped(latents)
    if tile is not None and max(latents.shape[-2:]) > tile:
        return _decoded_in_tiles(model, latents, tile)
    try:
        return clamped(model.decode_first_stage(latents))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if len(latents) > 1:
        return torch.cat([decode(model, latent) for latent in latents.split(1)])
    return _decoded_in_smaller_tiles(model, latents)


def _decoded_in_smaller_tiles(model: Any, latents: Tensor) -> Tensor:
    for side in (side for side in DECODING_TILES if side < max(latents.shape[-2:])):
        logger.warning("decoding does not fit into memory; decoding tiles of %d × %d latents", side, side)
        try:
            return _decoded_in_tiles(model, latents, side)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise UserError("out of memory; use smaller images")


def _decoded_in_tiles(model: Any, latents: Tensor, side: int) -> Tensor:
    return in_tiles(lambda tile: clamped(model.decode_first_stage(tile)), latents, side, side // 4, model.downsampling)


def clamped(images: Tensor) -> Tensor:
    """Return images as float32 in [-1, 1] on the CPU; infinite values become NaN, not black or white."""
    images = images.float()
    return torch.where(images.isfinite(), images.clamp(-1.0, 1.0), torch.nan).cpu()
