"""PLMS sampler: pseudo linear multistep sampling (PNDM, arXiv:2202.09778)."""

from __future__ import annotations

import torch

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.parameterization import Prediction
from ldm.modules.diffusionmodules.schedule import extract_into_tensor

# Adams-Bashforth weights, newest prediction first, for each number of earlier predictions.
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """PLMS sampler (arXiv:2202.09778).

    ::

        x_s = √ᾱ_s · (x_t - √(1 - ᾱ_t) · ε') / √ᾱ_t + √(1 - ᾱ_s) · ε'

        ε' = (55 ε̂_t - 59 ε̂_{t+1} + 37 ε̂_{t+2} - 9 ε̂_{t+3}) / 24

    These are DDIM steps at η = 0 with an Adams-Bashforth combination ε' of the last four noise predictions; t + i is
    the i-th timestep of the grid after t. The first steps use lower orders. The first one evaluates the model twice.
    """

    name = "PLMS"

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set the grid and the tables of `DDIMSampler`.

        Raises:
            UserError: `ddim_eta` is not 0; the method is deterministic.
        """
        if ddim_eta != 0:
            raise UserError(f"PLMS is deterministic: eta must be 0, got {ddim_eta}")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta)

    def begin(self) -> None:
        """Reset the predictions of the previous run."""
        self.old_eps: list[torch.Tensor] = []

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one multistep step; the first is an improved Euler step, which evaluates the model twice."""
        eps = self.predict(x, index, cond).eps
        if self.old_eps:
            history = [eps, *reversed(self.old_eps)]
            combined = sum(w * e for w, e in zip(WEIGHTS[len(self.old_eps)], history, strict=True))
        else:
            x_next, _ = self.ddim_step(x, index, self.prediction_of(x, index, eps))
            combined = (eps + self.predict(x_next, max(index - 1, 0), cond).eps) / 2
        self.old_eps = [*self.old_eps, eps][-3:]
        return self.ddim_step(x, index, self.prediction_of(x, index, combined))

    def prediction_of(self, x: torch.Tensor, index: int, eps: torch.Tensor) -> Prediction:
        """Return the prediction for x whose noise is `eps`."""
        alpha = extract_into_tensor(self.model.alphas_cumprod, self.timesteps_at(x, index), x.shape).to(x.dtype)
        return Prediction(eps, (x - (1 - alpha).sqrt() * eps) / alpha.sqrt())
