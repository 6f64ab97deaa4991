"""DPM-Solver++ of second order, the multistep one (arXiv:2211.01095, algorithm 2)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import GridSampler
from ldm.modules.diffusionmodules.schedule import make_ddim_sampling_parameters

FEW_STEPS = 15  # below so many the last step is of first order, for stability


class DPMSolverSampler(GridSampler):
    """Solves the probability-flow ODE along the model's estimates of x_start, extrapolated in λ from the last two.

    λ = log(√ᾱ / √(1 - ᾱ)). With one estimate, as in the first step, a step is DDIM's at eta 0. The sampler's own
    grid is even in λ from the model's last step to step 0, and then goes to the data. It draws no noise but the
    start's and, with a mask, the known part's.
    """

    name = "DPM-Solver++"
    own_grid = "logsnr"

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the grid and the tables (S + 1,) at its positions, after the position where the run ends.

        Raises:
            UserError: `ddim_eta` other than 0, as the method is deterministic; or no such grid.
        """
        if ddim_eta != 0:
            raise UserError(f"DPM-Solver++ is deterministic: eta must be 0, got {ddim_eta}")
        self.ddim_timesteps = self.grid(ddim_num_steps, ddim_discretize)
        _, alphas, alphas_prev = make_ddim_sampling_parameters(self.alphas_cumprod, self.ddim_timesteps, 0.0)
        alphas = np.append(alphas_prev[:1], alphas)
        self.signal, self.spread = np.sqrt(alphas), np.sqrt(1 - alphas)
        with np.errstate(divide="ignore"):  # at the data λ is infinite
            self.half_logsnr = np.log(self.signal / self.spread)

    def begin(self) -> None:
        """Forget the estimate of the previous run."""
        self.previous: torch.Tensor | None = None

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """One step from grid position `index`, which is entry `index` + 1 of the tables, down to the one before."""
        x_start = self.quantized(self.predict(x, index, cond).x_start)
        h = float(self.half_logsnr[index] - self.half_logsnr[index + 1])
        estimate = x_start
        if self.previous is not None and not self.is_last_and_plain(index):
            h_before = float(self.half_logsnr[index + 1] - self.half_logsnr[index + 2])
            estimate = x_start + h / (2 * h_before) * (x_start - self.previous)
        self.previous = x_start
        shrink = float(self.spread[index] / self.spread[index + 1])
        return shrink * x - float(self.signal[index]) * math.expm1(-h) * estimate, x_start

    def is_last_and_plain(self, index: int) -> bool:
        """Whether this step is the last and to be of first order: in a short run, or to the data at infinite λ."""
        return index == 0 and (len(self.ddim_timesteps) < FEW_STEPS or math.isinf(self.half_logsnr[0]))
