"""DDIM sampler: denoising diffusion implicit models (arXiv:2010.02502)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ldm.compat import published_names
from ldm.errors import UserError
from ldm.models.diffusion.attributes import StepTable
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.sampler import Denoiser, GridSampler, SamplingOptions
from ldm.modules.diffusionmodules.parameterization import Prediction
from ldm.modules.diffusionmodules.schedule import extract_into_tensor

__getattr__ = published_names(__name__)


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
    own_loop = "ddim_sampling"
    loops_and_steps: tuple[str, ...] = ("ddim_sampling", "p_sample_ddim")

    ddim_sigmas, ddim_alphas, ddim_alphas_prev = StepTable(), StepTable(), StepTable()

    def __init__(self, model: Denoiser, schedule: str = "linear", **kwargs: Any) -> None:
        super().__init__(model, schedule, **kwargs)
        self.tables: dict[str, np.ndarray] = {}
        self.ddim_eta = 0.0
        self.use_original_steps = False

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set `ddim_timesteps` and, for them, `ddim_sigmas`, `ddim_alphas`, `ddim_alphas_prev` (each (S,))."""
        self.ddim_eta = ddim_eta
        self.ddim_timesteps, sigmas, alphas, alphas_prev = self.grid(ddim_num_steps, ddim_discretize, ddim_eta)
        self.register_buffer("ddim_sigmas", sigmas)
        self.register_buffer("ddim_alphas", alphas)
        self.register_buffer("ddim_alphas_prev", alphas_prev)

    @property
    def ddim_sqrt_one_minus_alphas(self) -> torch.Tensor:
        """√(1 - ᾱ) of each step, (S,)."""
        return (1.0 - self.ddim_alphas).sqrt()

    @property
    def ddim_sigmas_for_original_num_steps(self) -> torch.Tensor:
        """σ of each step on the grid of all timesteps, (T,)."""
        alphas, previous = self.alphas_cumprod, self.alphas_cumprod_prev
        return self.ddim_eta * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()

    # -- loop and step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def ddim_sampling(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: torch.Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: Any = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Run the loop over the grid of `make_schedule`; see `Sampler.run`.

        Args:
            cond: conditioning of the batch.
            shape: (B, C, H, W).
            ddim_use_original_steps: visit all timesteps of the model.
            timesteps: visit the first steps of the grid: all below this number, as published.
            quantize_denoised: see `quantize_x0` of `SamplingOptions`, which has the other arguments too.
        """
        options = replace(
            self.options,
            callback=callback,
            img_callback=img_callback,
            mask=mask,
            x0=x0,
            log_every_t=log_every_t,
            quantize_x0=quantize_denoised,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold,
            ucg_schedule=ucg_schedule,
        )
        grid = self._timesteps(ddim_use_original_steps)
        if timesteps is not None:
            grid = grid[: timesteps if ddim_use_original_steps else min(timesteps, len(grid)) - 1]
        return self._run_on(grid, shape, cond, options, x_T, ddim_use_original_steps)

    def _timesteps(self, use_original_steps: bool) -> np.ndarray:
        return np.arange(self.ddpm_num_timesteps) if use_original_steps else self.ddim_timesteps

    def _run_on(
        self,
        grid: np.ndarray,
        shape: Sequence[int],
        cond: Conditioning,
        options: SamplingOptions,
        x_T: torch.Tensor | None,
        use_original_steps: bool,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        self.use_original_steps = use_original_steps
        try:
            return self.run(shape, grid, cond, options, x_T, self.start)
        finally:
            self.use_original_steps, self.timesteps = False, None

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step under its published name, so that a subclass can override it."""
        arguments = self.step_arguments() | ({"repeat_noise": True} if self.options.repeat_noise else {})
        t = self.timesteps_at(x, index)
        x_prev, x_start, *_ = self.p_sample_ddim(
            x, cond, t, index=index, use_original_steps=self.use_original_steps, **arguments
        )
        return x_prev, x_start

    @torch.no_grad()
    def p_sample_ddim(
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
        dynamic_threshold: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one DDIM step; return x at the next index and the estimate of x_start.

        Args:
            x: (B, C, H, W) at grid index `index`.
            c: conditioning of the batch.
            t: timesteps (B,) that the model sees.
            index: index in the grid of `make_schedule`, or with `use_original_steps` a timestep of the model.
            quantize_denoised: see `quantize_x0` of `SamplingOptions`, which has the other arguments too.

        Raises:
            UserError: `dynamic_threshold` is set; a subclass can implement it.
        """
        if dynamic_threshold is not None:
            raise UserError("DDIMSampler has no dynamic thresholding; leave out dynamic_threshold")
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
            return self.ddim_step(x, index, self.predict(x, index, c, t))

    @contextmanager
    def _one_step(self, options: SamplingOptions, use_original_steps: bool) -> Iterator[None]:
        """Use the options for one step, inside a run and without one."""
        before = self.options, self.timesteps, self.use_original_steps
        if self.timesteps is None:
            self.timesteps = self._timesteps(use_original_steps)
        self.options, self.use_original_steps = options, use_original_steps
        try:
            yield
        finally:
            self.options, self.timesteps, self.use_original_steps = before

    def ddim_step(self, x: torch.Tensor, index: int, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one DDIM step with the given prediction; return x at the next index and the estimate of x_start."""
        _, alpha_prev, sigma = self.values_at(index)
        x_start = self.quantized(prediction.x_start)
        direction = max(1.0 - alpha_prev - sigma**2, 0.0) ** 0.5 * prediction.eps
        return alpha_prev**0.5 * x_start + direction + sigma * self.noise(x, index), x_start

    def values_at(self, index: int) -> tuple[float, float, float]:
        """Return ᾱ at a grid index, ᾱ after the step from it, and σ of the step."""
        if self.use_original_steps:
            tables: Iterable[Any] = (
                self.alphas_cumprod,
                self.alphas_cumprod_prev,
                self.ddim_sigmas_for_original_num_steps,
            )
        else:
            tables = tuple(self.tables[name] for name in ("ddim_alphas", "ddim_alphas_prev", "ddim_sigmas"))
        alpha, alpha_prev, sigma = (float(table[index]) for table in tables)
        return alpha, alpha_prev, sigma

    def alpha_at(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return ᾱ at grid index `index` for the batch x, (B, 1, 1, 1)."""
        return x.new_full((x.shape[0], *[1] * (x.dim() - 1)), self.values_at(index)[0])

    # -- from an image, and back to its noise ----------------------------------------------------------------

    @torch.no_grad()
    def stochastic_encode(
        self, x0: torch.Tensor, t: torch.Tensor, use_original_steps: bool = False, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return latents (B, C, H, W), noised to the grid indices t (B,), for `decode`.

        Args:
            x0: clean latents.
            t: index of each item; the index after the end of the grid is the last timestep of the model.
            use_original_steps: t are timesteps of the model.
            noise: the noise; by default it is sampled.
        """
        alphas = self.alphas_cumprod
        if not use_original_steps:
            alphas = torch.cat([self.ddim_alphas, alphas[-1:].to(self.ddim_alphas)])
        alpha = extract_into_tensor(alphas, t.to(alphas.device), x0.shape).to(x0)
        noise = torch.randn_like(x0) if noise is None else noise
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: torch.Tensor,
        cond: Conditioning,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Run the first `t_start` steps of the grid, from latents (B, C, H, W) of `stochastic_encode` or `encode`.

        Args:
            x_latent: the latents at grid index `t_start`.
            cond: conditioning of the batch.
            t_start: number of steps.
            unconditional_guidance_scale, unconditional_conditioning, callback: see `SamplingOptions`.
            use_original_steps: visit the timesteps of the model.
        """
        options = replace(
            self.options,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            callback=callback,
        )
        grid = self._timesteps(use_original_steps)[:t_start]
        if len(grid) == 0:
            return x_latent
        return self._run_on(grid, tuple(x_latent.shape), cond, options, x_latent, use_original_steps)[0]

    @torch.no_grad()
    def encode(
        self,
        x0: torch.Tensor,
        c: Conditioning,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Invert DDIM: return the latents at grid index `t_enc` from which `decode` finds x0 (arXiv:2105.05233).

        As published, the model sees the number of a step as its timestep. That is exact with `use_original_steps`.

        Args:
            x0: clean latents (B, C, H, W).
            c: conditioning of the batch.
            t_enc: number of steps.
            use_original_steps: visit the timesteps of the model.
            return_intermediates: number of intermediate latents to return; None for none.
            unconditional_guidance_scale, unconditional_conditioning: see `SamplingOptions`.
            callback: called with the number of the step, from 0.

        Returns:
            The latents, and a dict with them as `x_encoded`, the steps `intermediate_steps` of the intermediate
            latents, and with `return_intermediates` these as `intermediates`.

        Raises:
            ValueError: the grid has fewer than `t_enc` steps.
        """
        if t_enc > len(self._timesteps(use_original_steps)):
            raise ValueError(f"t_enc is {t_enc}, but the grid has {len(self._timesteps(use_original_steps))} steps")
        options = replace(
            self.options,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
        )
        x, steps, intermediates = x0, [], []
        stride = max(1, t_enc // return_intermediates) if return_intermediates else 0
        for i in range(t_enc):
            with self._one_step(options, use_original_steps):
                x = self._inverse_step(x, i, c)
            if stride and (i % stride == 0 or i >= t_enc - 2):
                steps.append(i)
                intermediates.append(x)
            if callback:
                callback(i)
        out = {"x_encoded": x, "intermediate_steps": steps}
        return x, out | ({"intermediates": intermediates} if return_intermediates else {})

    def _inverse_step(self, x: torch.Tensor, index: int, cond: Conditioning) -> torch.Tensor:
        """Return x at grid index `index` for x at the end of the step from it."""
        alpha, alpha_prev, _ = self.values_at(index)
        before = x.new_full((x.shape[0], *[1] * (x.dim() - 1)), alpha_prev)
        eps = self.predict(x, index, cond, torch.full((x.shape[0],), index, device=x.device), before).eps
        x_start = (x - (1.0 - alpha_prev) ** 0.5 * eps) / alpha_prev**0.5
        return alpha**0.5 * x_start + (1.0 - alpha) ** 0.5 * eps
