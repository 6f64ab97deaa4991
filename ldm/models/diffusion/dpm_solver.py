"""DPM-Solver++ sampler: the second-order multistep solver (arXiv:2211.01095)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import GridSampler

LOWER_ORDER_FINAL_BELOW = 15  # runs of fewer steps end with a first-order step, for stability


class DPMSolverSampler(GridSampler):
    """DPM-Solver++(2M) sampler (arXiv:2211.01095, algorithm 2).

    ::

        x_s = (σ_s / σ_t) · x_t - α_s · (exp(-h) - 1) · D,   D = x̂_0(t) + h / (2 h') · (x̂_0(t) - x̂_0(r))

        α = √ᾱ,   σ = √(1 - ᾱ),   λ = log(α / σ),   h = λ_s - λ_t,   h' = λ_t - λ_r

    Here r, t and s are consecutive timesteps of the run and x̂_0 is the model's estimate of x_start. The first step
    has a single estimate, D = x̂_0(t), and equals a DDIM step at η = 0. The default grid is even in λ from the last
    timestep of the model to timestep 0; a last step reaches the data. The method is deterministic: it samples the
    start noise and, with a mask, the noise of the known region.
    """

    name = "DPM-Solver++"
    own_grid = "logsnr"

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set the grid, and the tables `alphas`, `sigmas`, `lambdas` (each (S + 1,)).

        Entry 0 of a table belongs to the end of the run, entry i + 1 to grid index i.

        Raises:
            UserError: `ddim_eta` is not 0, as the method is deterministic; or there is no such grid.
        """
        if ddim_eta != 0:
            raise UserError(f"DPM-Solver++ is deterministic: eta must be 0, got {ddim_eta}")
        self.ddim_timesteps, _, alphas_cumprod, alphas_cumprod_prev = self.grid(ddim_num_steps, ddim_discretize)
        alphas_cumprod = np.append(alphas_cumprod_prev[:1], alphas_cumprod)
        self.alphas, self.sigmas = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod)
        with np.errstate(divide="ignore"):  # λ is ∞ at the data, and -∞ where ᾱ = 0
            self.lambdas = np.log(self.alphas / self.sigmas)

    def begin(self) -> None:
        """Reset the estimate of the previous run."""
        self.previous: torch.Tensor | None = None

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step, of first order if there is no earlier estimate."""
        x_start = self.quantized(self.predict(x, index, cond).x_start)
        end, now = float(self.lambdas[index]), float(self.lambdas[index + 1])
        h = math.inf if math.isinf(now) else end - now
        estimate = x_start
        if self.previous is not None and not self.is_first_order(index):
            h_before = float(self.lambdas[index + 1] - self.lambdas[index + 2])
            estimate = x_start + h / (2 * h_before) * (x_start - self.previous)
        self.previous = x_start
        shrink = float(self.sigmas[index] / self.sigmas[index + 1])
        return shrink * x - float(self.alphas[index]) * math.expm1(-h) * estimate, x_start

    def is_first_order(self, index: int) -> bool:
        """Return whether the step ignores the earlier estimate.

        This is the last step of a short run, a step to infinite λ, and the step after one from λ = -∞, over which the
        estimate has no slope.
        """
        if index == 0 and (len(self.ddim_timesteps) < LOWER_ORDER_FINAL_BELOW or math.isinf(self.lambdas[0])):
            return True
        return math.isinf(self.lambdas[index + 2])
