"""Denoisers in closed form, for tests of samplers."""

from __future__ import annotations

import math

import torch

from ldm.modules.diffusionmodules.schedule import (
    diffusion_tables,
    extract_into_tensor,
    make_beta_schedule,
    rescale_zero_terminal_snr,
)


class Gaussian:
    """Exact denoiser of data distributed as N(mean, std²), independently in every pixel.

    A conditioning (B, 1) replaces the mean. `fineness` divides every beta of the schedule. With `zero_snr` the schedule
    ends at ᾱ = 0.
    """

    def __init__(self, mean=0.5, std=0.3, timesteps=1000, parameterization="eps", fineness=1, zero_snr=False):
        self.mean, self.std, self.num_timesteps, self.parameterization = mean, std, timesteps, parameterization
        self.device = torch.device("cpu")
        betas = make_beta_schedule("linear", timesteps, 0.0015 / fineness, 0.0195 / fineness)
        tables = diffusion_tables(rescale_zero_terminal_snr(betas) if zero_snr else betas)
        self.tables = {name: torch.tensor(table) for name, table in tables.items()}
        self.alphas_cumprod = self.tables["alphas_cumprod"]
        self.calls = []

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        alpha = extract_into_tensor(self.alphas_cumprod, t, x_start.shape)
        return alpha.sqrt() * x_start + (1 - alpha).sqrt() * noise

    def q_posterior(self, x_start, x_t, t):
        get = lambda name: extract_into_tensor(self.tables[name], t, x_t.shape)  # noqa: E731
        mean = get("posterior_mean_coef1") * x_start + get("posterior_mean_coef2") * x_t
        return mean, get("posterior_variance"), get("posterior_log_variance_clipped")

    def apply_model(self, x, t, cond):
        self.calls.append(int(t[0]))
        alpha = extract_into_tensor(self.alphas_cumprod, t, x.shape)
        x_start = self.estimate(x, alpha, cond)
        eps = (x - alpha.sqrt() * x_start) / (1 - alpha).sqrt()
        v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x_start
        return {"eps": eps, "x0": x_start, "v": v}[self.parameterization]

    def estimate(self, x, alpha, cond=None):
        """Return E[x_0 | x_t]."""
        mean = self.mean if cond is None else cond[:, :, None, None]
        gain = alpha.sqrt() * self.std**2 / (alpha * self.std**2 + 1 - alpha)
        return mean + gain * (x - alpha.sqrt() * mean)

    def flow(self, x, alpha, alpha_end=1.0):
        """Return the solution of the probability-flow ODE from x at ᾱ = alpha to alpha_end: the same quantile."""
        alpha, alpha_end = float(alpha), float(alpha_end)
        std, std_end = (math.sqrt(a * self.std**2 + 1 - a) for a in (alpha, alpha_end))
        return math.sqrt(alpha_end) * self.mean + std_end / std * (x - math.sqrt(alpha) * self.mean)


class FixedEstimate(Gaussian):
    """Denoiser whose estimate is always the given x_start."""

    def __init__(self, x_start, timesteps):
        super().__init__(timesteps=timesteps, parameterization="x0")
        self.x_start = x_start

    def estimate(self, x, alpha, cond=None):
        return self.x_start
