"""Diffusion process of a model: the tables of its noise schedule as buffers, and their closed forms.

Shapes: x_start, x_t, noise (B, C, H, W); timesteps t (B,) int64 from 0 to T - 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ldm.modules.diffusionmodules.schedule import diffusion_tables, extract_into_tensor


class DiffusionProcess(nn.Module):
    """Forward process q(x_t | x_0) and posterior q(x_{t-1} | x_t, x_0) for a schedule of betas (arXiv:2006.11239).

    The tables are buffers under the published names. They stay in float32 whatever the precision of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self._float32_buffers: list[str] = []

    def register_schedule(self, betas: np.ndarray, v_posterior: float = 0.0) -> dict[str, np.ndarray]:
        """Register the tables of `schedule.diffusion_tables` as buffers of shape (T,); return them in float64."""
        self.num_timesteps = len(betas)
        tables = diffusion_tables(betas, v_posterior)
        for name, table in tables.items():
            self.register_table(name, table)
        return tables

    def register_table(self, name: str, table: np.ndarray | float, persistent: bool = True) -> None:
        """Register a buffer that stays in float32; the state dict contains it only if it is `persistent`."""
        self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=persistent)
        self._float32_buffers.append(name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DiffusionProcess:
        """Move or cast the model, but keep its tables in float32: half precision cannot represent ᾱ of small t."""
        before = {name: getattr(self, name) for name in self._float32_buffers}
        super()._apply(fn, recurse)
        for name, table in before.items():
            if getattr(self, name).dtype != table.dtype:
                setattr(self, name, table.to(getattr(self, name).device))
        return self

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.betas.device

    def q_mean_variance(self, x_start: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return mean, variance and log-variance of q(x_t | x_0)."""
        shape = x_start.shape
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, shape) * x_start,
            extract_into_tensor(1.0 - self.alphas_cumprod, t, shape),
            extract_into_tensor(self.log_one_minus_alphas_cumprod, t, shape),
        )

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Sample from q(x_t | x_0), equation 4: √ᾱ_t x_0 + √(1 - ᾱ_t) noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        mean = extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        return mean + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise

    def predict_start_from_noise(self, x_t: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_0 for x_t and the noise in it."""
        scaled = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return scaled - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def q_posterior(self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), equation 7."""
        shape = x_t.shape
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, shape) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, shape) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, shape)
