"""Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2)."""

from __future__ import annotations

import torch

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import Sampler


class AncestralSampler(Sampler):
    """One step for every step of the model, from q(x_{t-1} | x_t, x_start).

    Args:
        model: beside the sampler's protocol it needs `q_posterior(x_start, x_t, t)`.
        clip_denoised: clamp every estimate of x_start to [-1, 1], for models of pixels.
    """

    name = "DDPM"

    def __init__(self, model: object, clip_denoised: bool = False) -> None:
        super().__init__(model)
        self.clip_denoised = clip_denoised

    def before_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Nothing: here the known part replaces the result of a step, as published."""
        return x

    def after_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Put the known part in its place."""
        return self.blend(x, index)

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of algorithm 2; the last adds no noise."""
        t = self.steps_of(x, index)
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
        """The conditioning, itself noised where the model was trained so (`num_timesteps_cond` > 1)."""
        if not getattr(self.model, "shorten_cond_schedule", False):
            return cond
        return self.model.q_sample(x_start=cond, t=self.model.cond_ids[t], noise=torch.randn_like(cond.float()))
