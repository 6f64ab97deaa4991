"""Ancestral sampler: denoising diffusion probabilistic models (DDPM, arXiv:2006.11239)."""

from __future__ import annotations

import torch

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import Sampler


class AncestralSampler(Sampler):
    """Ancestral DDPM sampler (arXiv:2006.11239, equation 7 and algorithm 2).

    ::

        x_{t-1} = √ᾱ_{t-1} β_t / (1 - ᾱ_t) · x̂_0 + √(1 - β_t) (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · x_t + σ_t · z

        σ_t² = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)

    This samples q(x_{t-1} | x_t, x̂_0) with z ~ N(0, I), one step for every timestep of the model. The last step adds
    no noise. A model with `v_posterior` interpolates σ_t² towards β_t.

    Args:
        model: a `Denoiser` that also has `q_posterior(x_start, x_t, t)`.
        clip_denoised: clamp every estimate of x_start to [-1, 1], for models of pixels.
    """

    name = "DDPM"

    def __init__(self, model: object, clip_denoised: bool = False) -> None:
        super().__init__(model)
        self.clip_denoised = clip_denoised

    def before_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return x: as published, the known region replaces the result of a step here."""
        return x

    def after_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return x with the known region, noised to the timestep of `index`."""
        return self.blend(x, index)

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step of algorithm 2."""
        t = self.timesteps_at(x, index)
        x_start = self.predict(x, index, self.conditioning_at(cond, t)).x_start
        if self.clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        x_start = self.quantized(x_start)
        mean, _, log_variance = self.model.q_posterior(x_start=x_start, x_t=x, t=t)
        noise = self.noise(x, index)
        if self.timesteps[index] == 0:
            return mean, x_start
        return mean + (0.5 * log_variance).exp() * noise, x_start

    def conditioning_at(self, cond: Conditioning, t: torch.Tensor) -> Conditioning:
        """Return the conditioning at timesteps t, noised if the model noises it (`num_timesteps_cond` > 1)."""
        if not getattr(self.model, "shorten_cond_schedule", False):
            return cond
        return self.model.q_sample(x_start=cond, t=self.model.cond_ids[t], noise=torch.randn_like(cond.float()))
