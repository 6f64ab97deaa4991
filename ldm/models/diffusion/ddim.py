"""DDIM sampler: denoising diffusion implicit models (arXiv:2010.02502)."""

from __future__ import annotations

import torch

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import GridSampler
from ldm.modules.diffusionmodules.parameterization import Prediction
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters


class DDIMSampler(GridSampler):
    """DDIM sampler (arXiv:2010.02502, equations 12 and 16).

    ::

        x_s = √ᾱ_s · x̂_0 + √(1 - ᾱ_s - σ_t²) · ε̂ + σ_t · z,   x̂_0 = (x_t - √(1 - ᾱ_t) · ε̂) / √ᾱ_t

        σ_t = η · √((1 - ᾱ_s) / (1 - ᾱ_t)) · √(1 - ᾱ_t / ᾱ_s)

    Here t is a timestep of the grid, s the one before it, ε̂ the model's noise prediction and z ~ N(0, I). The method
    is deterministic for η = 0. For η = 1 on the full grid it is ancestral sampling.

    Example:
        >>> class Gaussian:  # exact denoiser of data with independent pixels, distributed as N(0.5, 0.2²)
        ...     parameterization, num_timesteps, device = "eps", 1000, torch.device("cpu")
        ...     alphas_cumprod = torch.linspace(1.0, 0.001, 1001)[1:]
        ...
        ...     def apply_model(self, x_noisy, t, cond):
        ...         alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        ...         return (1 - alpha).sqrt() * (x_noisy - alpha.sqrt() * 0.5) / (alpha * 0.2**2 + 1 - alpha)
        >>> _ = torch.manual_seed(0)
        >>> samples, _ = DDIMSampler(Gaussian()).sample(S=100, batch_size=4, shape=(3, 16, 16), verbose=False)
        >>> samples.shape
        torch.Size([4, 3, 16, 16])
        >>> round(samples.mean().item(), 1), round(samples.std().item(), 1)
        (0.5, 0.2)
    """

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
        """Run one DDIM step."""
        return self.ddim_step(x, index, self.predict(x, index, cond))

    def ddim_step(self, x: torch.Tensor, index: int, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one DDIM step with the given prediction; return x at the next index and the estimate of x_start."""
        alpha_prev, sigma = float(self.ddim_alphas_prev[index]), float(self.ddim_sigmas[index])
        x_start = self.quantized(prediction.x_start)
        direction = max(1.0 - alpha_prev - sigma**2, 0.0) ** 0.5 * prediction.eps
        return alpha_prev**0.5 * x_start + direction + sigma * self.noise(x, index), x_start
