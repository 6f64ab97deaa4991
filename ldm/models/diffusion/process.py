"""Diffusion process of a model: the tables of its noise schedule as buffers, and their closed forms.

Shapes: x_start, x_t, noise (B, C, H, W); timesteps t (B,) int64 from 0 to T - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.modules.diffusionmodules.parameterization import check_signal
from ldm.modules.diffusionmodules.schedule import (
    TABLE_NAMES,
    check_betas,
    diffusion_tables,
    extract_into_tensor,
    lvlb_weights,
    make_beta_schedule,
    min_snr_weights,
    rescale_zero_terminal_snr,
)


class DiffusionProcess(nn.Module):
    """Forward process q(x_t | x_0) and posterior q(x_{t-1} | x_t, x_0) for a schedule of betas (arXiv:2006.11239).

    The tables are buffers under the published names. They stay in float32 whatever the precision of the model.
    """

    num_timesteps: int
    betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    alphas_cumprod_prev: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    log_one_minus_alphas_cumprod: torch.Tensor
    sqrt_recip_alphas_cumprod: torch.Tensor
    sqrt_recipm1_alphas_cumprod: torch.Tensor
    posterior_variance: torch.Tensor
    posterior_log_variance_clipped: torch.Tensor
    posterior_mean_coef1: torch.Tensor
    posterior_mean_coef2: torch.Tensor
    lvlb_weights: torch.Tensor
    loss_weights: torch.Tensor

    # Options of the schedule and of the loss.
    parameterization: str = "eps"
    v_posterior: float = 0.0
    rescale_betas_zero_snr: bool = False
    min_snr_gamma: float | None = None

    computed_buffers = TABLE_NAMES  # for `load_weights`: a file may lack all of them

    def __init__(self) -> None:
        super().__init__()
        self._float32_buffers: list[str] = []
        self._has_fixed_schedule = False

    def register_schedule(
        self,
        given_betas: Sequence[float] | np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the tables of the noise schedule and of the loss as buffers (T,); see `make_beta_schedule`.

        Raises:
            UserError: the betas are out of range; or the parameterization is "eps", and ᾱ is 0 at a timestep.
        """
        self.linear_start, self.linear_end = linear_start, linear_end
        betas = given_betas
        if betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        tables = self.register_betas(betas, self.v_posterior, self.rescale_betas_zero_snr)
        check_signal(self.parameterization, tables["alphas_cumprod"].astype(np.float32))
        self.register_loss_weights(tables, self.parameterization, self.min_snr_gamma)

    def register_betas(
        self, betas: Sequence[float] | np.ndarray, v_posterior: float = 0.0, rescale_zero_snr: bool = False
    ) -> dict[str, np.ndarray]:
        """Register the tables of `schedule.diffusion_tables` as buffers of shape (T,); return them in float64.

        Args:
            betas: β_t (T,).
            v_posterior: see `schedule.diffusion_tables`.
            rescale_zero_snr: rescale the betas to zero terminal SNR, and keep the tables if a state dict is loaded.

        Raises:
            UserError: the betas are out of range.
        """
        betas = np.asarray(betas, dtype=np.float64)
        check_betas(betas)
        if rescale_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        self.num_timesteps = len(betas)
        self._has_fixed_schedule = rescale_zero_snr
        tables = diffusion_tables(betas, v_posterior)
        for name, table in tables.items():
            self.register_table(name, table)
        return tables

    def register_loss_weights(
        self, tables: Mapping[str, np.ndarray], parameterization: str, min_snr_gamma: float | None
    ) -> None:
        """Register the weights (T,) of the variational bound and of the simple loss, which are 1 without γ."""
        weights = np.ones(self.num_timesteps)
        if min_snr_gamma is not None:
            weights = min_snr_weights(tables["alphas_cumprod"], min_snr_gamma, parameterization)
        self.register_table("lvlb_weights", lvlb_weights(tables, parameterization), persistent=False)
        self.register_table("loss_weights", weights, persistent=False)

    def register_table(self, name: str, table: np.ndarray | float, persistent: bool = True) -> None:
        """Register a buffer that stays in float32; the state dict contains it only if it is `persistent`."""
        self.register_buffer(name, torch.tensor(table, dtype=torch.float32), persistent=persistent)
        self._float32_buffers.append(name)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        """Load this module's own entries of a state dict, but not its tables if the schedule is fixed."""
        if self._has_fixed_schedule:
            state_dict.update({f"{prefix}{name}": getattr(self, name) for name in TABLE_NAMES})
        super()._load_from_state_dict(state_dict, prefix, *args)

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

    def q_mean_variance(
        self, x_start: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
        """Return x_0 for x_t and the noise in it; 0 where ᾱ_t = 0, as the noise determines no x_0 there."""
        scaled = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return scaled - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * noise

    def q_posterior(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), equation 7."""
        shape = x_t.shape
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, shape) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, shape) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, shape)
