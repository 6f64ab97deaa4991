"""PLMS sampler: pseudo linear multistep sampling (PNDM, arXiv:2202.09778)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from ldm.compat import published_names
from ldm.errors import UserError
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.sampler import Denoiser
from ldm.modules.diffusionmodules.parameterization import Prediction, interpret

__getattr__ = published_names(__name__)

# Adams-Bashforth weights, newest prediction first, for each number of earlier predictions.
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(DDIMSampler):
    """PLMS sampler (arXiv:2202.09778).

    ::

        x_s = √ᾱ_s · (x_t - √(1 - ᾱ_t) · ε') / √ᾱ_t + √(1 - ᾱ_s) · ε'

        ε' = (55 ε̂_t - 59 ε̂_{t+1} + 37 ε̂_{t+2} - 9 ε̂_{t+3}) / 24

    These are DDIM steps at η = 0 with an Adams-Bashforth combination ε' of the last four noise predictions; t + i is
    the i-th timestep of the grid after t. The first steps use lower orders. The first one evaluates the model twice.

    Where ᾱ_t = 0, the noise is x_t and does not determine x̂_0. Such a step averages the estimates of x̂_0 at both of
    its ends, which is the trapezoidal rule of the same ODE.
    """

    name = "PLMS"
    own_loop = "plms_sampling"
    loops_and_steps = ("plms_sampling", "p_sample_plms")

    def __init__(self, model: Denoiser, schedule: str = "linear", **kwargs: Any) -> None:
        super().__init__(model, schedule, **kwargs)
        self.old_eps: list[torch.Tensor] = []

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
        self.old_eps = []

    def plms_sampling(
        self, cond: Conditioning, shape: Sequence[int], *args: Any, **options: Any
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Run the loop over the grid of `make_schedule`; the arguments are those of `DDIMSampler.ddim_sampling`."""
        return self.ddim_sampling(cond, shape, *args, **options)

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step under its published name, so that a subclass can override it."""
        arguments = self.step_arguments() | ({"repeat_noise": True} if self.options.repeat_noise else {})
        x_prev, x_start, eps = self.p_sample_plms(
            x,
            cond,
            self.timesteps_at(x, index),
            index=index,
            use_original_steps=self.use_original_steps,
            **arguments,
            old_eps=self.old_eps,
            t_next=self.timesteps_at(x, max(index - 1, 0)),
        )
        self.old_eps = [*self.old_eps, eps][-3:]
        return x_prev, x_start

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: torch.Tensor,
        c: Conditioning,
        t: torch.Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        old_eps: Sequence[torch.Tensor] | None = None,
        t_next: torch.Tensor | None = None,
        dynamic_threshold: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one multistep step; without earlier predictions an improved Euler step, which evaluates the model twice.

        Args:
            old_eps: the last noise predictions, at most three, from the earliest to the latest.
            t_next: timesteps (B,) that the model sees in the second evaluation.
            x, c, t, index, repeat_noise, use_original_steps: see `DDIMSampler.p_sample_ddim`.
            quantize_denoised, temperature, noise_dropout, score_corrector, corrector_kwargs: see there.
            unconditional_guidance_scale, unconditional_conditioning, dynamic_threshold: see there.

        Returns:
            x at the next index, the estimate of x_start, and the noise prediction.
        """
        if dynamic_threshold is not None:
            raise UserError("PLMSSampler has no dynamic thresholding; leave out dynamic_threshold")
        options = replace(
            self.options,
            repeat_noise=repeat_noise,
            quantize_x0=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )
        with self._one_step(options, use_original_steps):
            prediction = self.predict(x, index, c, t)
            combined = self.combined(x, index, c, prediction, old_eps or (), t_next)
            return *self.ddim_step(x, index, combined), prediction.eps

    def combined(
        self,
        x: torch.Tensor,
        index: int,
        cond: Conditioning,
        prediction: Prediction,
        old_eps: Sequence[torch.Tensor],
        t_next: torch.Tensor | None,
    ) -> Prediction:
        """Return the prediction to step with: a combination of the given one for x with earlier or later ones."""
        alpha, alpha_prev, _ = self.values_at(index)
        eps, is_noise = prediction.eps, alpha == 0.0
        past_grid = alpha_prev == 1.0 and self.timestep(index) > 0
        if index == 0 and (is_noise or (past_grid and not old_eps)):
            return prediction  # there is no timestep for a second evaluation
        if is_noise:
            following = self.following(x, index, cond, prediction, t_next)
            return Prediction(eps, (prediction.x_start + following.x_start) / 2)
        if old_eps:
            history = [eps, *reversed(old_eps[-3:])]
            weights = WEIGHTS[len(history) - 1]
            combined = cast(torch.Tensor, sum(w * e for w, e in zip(weights, history, strict=True)))
            return self.prediction_of(x, index, combined)
        following = self.following(x, index, cond, self.prediction_of(x, index, eps), t_next)
        return self.prediction_of(x, index, (eps + following.eps) / 2)

    def following(
        self, x: torch.Tensor, index: int, cond: Conditioning, prediction: Prediction, t_next: torch.Tensor | None
    ) -> Prediction:
        """Return the prediction at the end of a DDIM step with `prediction`."""
        x_next, _ = self.ddim_step(x, index, prediction)
        return self.predict(x_next, max(index - 1, 0), cond, t_next)

    def prediction_of(self, x: torch.Tensor, index: int, eps: torch.Tensor) -> Prediction:
        """Return the prediction for x whose noise is `eps`."""
        return interpret("eps", eps, x, self.alpha_at(x, index))
