"""Denoising diffusion implicit models (arXiv:2010.02502)."""

from __future__ import annotations

import torch

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import GridSampler
from ldm.modules.diffusionmodules.parameterization import Prediction
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters


class DDIMSampler(GridSampler):
    """Equation 12 of the paper on a grid of S steps; `eta` sets how much noise a step adds."""

    name = "DDIM"

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set `ddim_timesteps` and, for them, `ddim_sigmas`, `ddim_alphas`, `ddim_alphas_prev` (each (S,))."""
        self.ddim_timesteps = self.grid(ddim_num_steps, ddim_discretize)
        self.ddim_sigmas, self.ddim_alphas, self.ddim_alphas_prev = make_ddim_sampling_parameters(
            self.alphas_cumprod, self.ddim_timesteps, ddim_eta
        )

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """One DDIM step."""
        return self.move(x, index, self.predict(x, index, cond))

    def move(self, x: torch.Tensor, index: int, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """Go to the next grid position along `prediction`: (x_prev, estimate of x_start)."""
        alpha_prev, sigma = float(self.ddim_alphas_prev[index]), float(self.ddim_sigmas[index])
        x_start = self.quantized(prediction.x_start)
        direction = max(1.0 - alpha_prev - sigma**2, 0.0) ** 0.5 * prediction.eps
        return alpha_prev**0.5 * x_start + direction + sigma * self.noise(x, index), x_start
