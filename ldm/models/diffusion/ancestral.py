"""Ancestral sampler: denoising diffusion probabilistic models (DDPM, arXiv:2006.11239)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from ldm.models.diffusion.attributes import is_overridden
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import Denoiser, Sampler
from ldm.modules.diffusionmodules.schedule import extract_into_tensor


class AncestralDenoiser(Denoiser, Protocol):
    """Denoiser that knows its posterior."""

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)."""


class AncestralSampler(Sampler):
    """Ancestral DDPM sampler (arXiv:2006.11239, equation 7 and algorithm 2).

    ::

        x_{t-1} = √ᾱ_{t-1} β_t / (1 - ᾱ_t) · x̂_0 + √(1 - β_t) (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · x_t + σ_t · z

        σ_t² = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)

    This samples q(x_{t-1} | x_t, x̂_0) with z ~ N(0, I), one step for every timestep of the model. The last step adds
    no noise. A model with `v_posterior` interpolates σ_t² towards β_t.

    Args:
        model: the model to sample from.
        clip_denoised: clamp every estimate of x_start to [-1, 1], for models of pixels.
    """

    name = "DDPM"
    model: AncestralDenoiser

    def __init__(self, model: AncestralDenoiser, clip_denoised: bool = False) -> None:
        super().__init__(model)
        self.clip_denoised = clip_denoised
        overridden = getattr(model, "overridden_step", None)  # a model of a subclass may have its own step
        self.model_step: Callable[..., Any] | None = overridden() if overridden is not None else None
        own_estimate = getattr(model, "predict_start_from_noise", None)
        self.own_estimate: Callable[..., Any] | None = own_estimate if is_overridden(own_estimate) else None
        self.x: torch.Tensor | None = None  # the result of the last step

    def before_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return x: as published, the known region replaces the result of a step here."""
        return x

    def after_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return x with the known region, noised to the timestep of `index`."""
        self.x = self.blend(x, index)
        return self.x

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step of algorithm 2."""
        t = self.timesteps_at(x, index)
        if self.model_step is not None:
            return self.model_step(x, cond, t, self.clip_denoised, self.options)
        x_start = self.estimate(x, cond, t)
        mean, _, log_variance = self.model.q_posterior(x_start=x_start, x_t=x, t=t)
        noise = self.noise(x, index)
        if self.timestep(index) == 0:
            return mean, x_start
        return mean + (0.5 * log_variance).exp() * noise, x_start

    def estimate(self, x: torch.Tensor, cond: Conditioning, t: torch.Tensor) -> torch.Tensor:
        """Return the estimate of x_start for x at timesteps t (B,), clamped and quantized as the run says."""
        alpha = extract_into_tensor(self.model.alphas_cumprod, t, x.shape).to(x.dtype)
        eps, x_start = self.predict(x, 0, self.conditioning_at(cond, t), t, alpha)
        if self.own_estimate is not None and self.model.parameterization == "eps":
            x_start = self.own_estimate(x, t=t, noise=eps)
        if self.clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return self.quantized(x_start)

    def conditioning_at(self, cond: Conditioning, t: torch.Tensor) -> Conditioning:
        """Return the conditioning at timesteps t, noised if the model noises it (`num_timesteps_cond` > 1)."""
        cond_ids = getattr(self.model, "cond_ids", None)
        if cond_ids is None:
            return cond
        noised = cast(torch.Tensor, cond)  # `num_timesteps_cond` needs a conditioning that is one tensor
        return self.model.q_sample(x_start=noised, t=cond_ids[t], noise=torch.randn_like(noised.float()))
