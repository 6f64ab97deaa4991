"""Pseudo linear multistep sampling (PNDM, arXiv:2202.09778)."""

from __future__ import annotations

import torch

from ldm.errors import UserError
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.diffusionmodules.parameterization import Prediction
from ldm.modules.diffusionmodules.schedule import extract_into_tensor

# Adams-Bashforth weights by the number of earlier predictions, the newest first.
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """DDIM steps at eta 0 along an extrapolation of the last four noise predictions."""

    name = "PLMS"

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """As for DDIM; the method is deterministic, so `ddim_eta` must be 0."""
        if ddim_eta != 0:
            raise UserError(f"PLMS is deterministic: eta must be 0, got {ddim_eta}")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta)

    def begin(self) -> None:
        """Forget the predictions of the previous run."""
        self.old_eps: list[torch.Tensor] = []

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """One multistep step; the first is an improved Euler step, which asks the model twice."""
        eps = self.predict(x, index, cond).eps
        if self.old_eps:
            history = [eps, *reversed(self.old_eps)]
            combined = sum(w * e for w, e in zip(WEIGHTS[len(self.old_eps)], history, strict=True))
        else:
            x_next, _ = self.move(x, index, self.along(x, index, eps))
            combined = (eps + self.predict(x_next, max(index - 1, 0), cond).eps) / 2
        self.old_eps = [*self.old_eps, eps][-3:]
        return self.move(x, index, self.along(x, index, combined))

    def along(self, x: torch.Tensor, index: int, eps: torch.Tensor) -> Prediction:
        """The prediction whose noise is `eps`."""
        alpha = extract_into_tensor(self.model.alphas_cumprod, self.steps_of(x, index), x.shape).to(x.dtype)
        return Prediction(eps, (x - (1 - alpha).sqrt() * eps) / alpha.sqrt())
