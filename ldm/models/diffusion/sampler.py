"""Reverse process: the loop that all samplers share, and the guidance of its predictions.

A sampler uses its model through the protocol `Denoiser` and imports no model. Subclasses implement `step`, the
arithmetic of one reverse step, and choose the grid of timesteps.

Shapes: x, eps, x_start are (B, C, H, W), float32 whatever the precision of the model. Timesteps t count from 0.

The order in which noise is sampled is part of the interface: the same seed produces the same image. Noise comes from
the global generator, or from the option `noise_sampler`. The start noise is first; it also noises the latent of SDEdit
(arXiv:2108.01073). Every step then samples the noise of the known region, if there is a mask, and the noise of the
step. As in the published samplers, a step samples its noise even if its standard deviation is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from tqdm import tqdm

from ldm.models.diffusion.attributes import OfModel, check_overrides
from ldm.models.diffusion.conditioning import Conditioning, Pairing, batch_size_of
from ldm.modules.diffusionmodules.parameterization import Prediction, check_signal, interpret
from ldm.modules.diffusionmodules.schedule import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)


class Denoiser(Protocol):
    """Interface of the models that samplers work on."""

    alphas_cumprod: torch.Tensor
    num_timesteps: int
    parameterization: str

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """Return the model's prediction (B, C, H, W): eps, x_start or v, according to `parameterization`."""

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return x_start noised to the timesteps t, with the given noise or with new noise."""


class LatentDenoiser(Denoiser, Protocol):
    """Denoiser of the latents of a first stage."""

    first_stage_model: Any


@dataclass
class SamplingOptions:
    """Options of a sampling run. The names are those of the published `sample`."""

    mask: torch.Tensor | None = None  # (B, 1 or C, H, W), 1 where x0 is kept
    x0: torch.Tensor | None = None  # (B, C, H, W), the known latent
    temperature: float | Sequence[float] = 1.0  # factor of the step noise; a sequence has one value per model timestep
    noise_dropout: float = 0.0
    quantize_x0: bool = False  # quantize every estimate of x_start with the codebook of the first stage
    repeat_noise: bool = False  # use the same step noise for the whole batch
    score_corrector: Any = None  # an object with `modify_score`, such as `classifier.ClassifierGuidance`
    corrector_kwargs: dict[str, Any] | None = field(default_factory=dict)
    unconditional_guidance_scale: float = 1.0
    unconditional_conditioning: Conditioning = None
    ucg_schedule: Sequence[float] | None = None  # a guidance scale for each step
    dynamic_threshold: Any = None  # for subclasses that override `p_sample_ddim`
    normals_sequence: Sequence[torch.Tensor] | None = None  # step noise, in the order of use
    noise_sampler: Callable[[Sequence[int]], torch.Tensor] | None = None  # returns noise of a shape, e.g. `SeededNoise`
    callback: Callable[[int], None] | None = None  # called with the number of the step, from 0
    img_callback: Callable[[torch.Tensor, int], None] | None = None  # called with the estimate of x_start and the step
    log_every_t: int = 100
    verbose: bool = True

    def __post_init__(self) -> None:
        if self.mask is not None and self.x0 is None:
            raise ValueError("a mask needs x0, the latent to keep where the mask is 1")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be a function, not {self.callback!r}; eta and others are keywords")
        self.corrector_kwargs = self.corrector_kwargs or {}

    @property
    def known_latent(self) -> torch.Tensor:
        """Known latent `x0`.

        Raises:
            ValueError: it is missing.
        """
        if self.x0 is None:
            raise ValueError("the run needs x0, the latent to keep or to start from")
        return self.x0

    @property
    def guided(self) -> bool:
        """Return whether the run uses classifier-free guidance."""
        return self.unconditional_conditioning is not None and self.unconditional_guidance_scale != 1.0


class Sampler:
    """Base class of samplers: the reverse process over a grid of timesteps.

    Subclasses implement `step`. They can reset their state in `begin`.

    Example:
        A sampler that moves to the model's estimate of x_start in a single step:

        >>> class PointMass:  # exact denoiser of data with a single image, which is 0.5 everywhere
        ...     parameterization, num_timesteps, device = "x0", 1000, torch.device("cpu")
        ...     alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
        ...
        ...     def apply_model(self, x_noisy, t, cond):
        ...         return torch.full_like(x_noisy, 0.5)
        >>> class OneStepSampler(Sampler):
        ...     def step(self, x, index, cond):
        ...         x_start = self.predict(x, index, cond).x_start
        ...         return x_start, x_start
        >>> grid, options = np.array([999]), SamplingOptions(verbose=False)
        >>> samples, intermediates = OneStepSampler(PointMass()).run((2, 3, 8, 8), grid, None, options)
        >>> samples.shape, samples.unique()
        (torch.Size([2, 3, 8, 8]), tensor([0.5000]))
        >>> sorted(intermediates)
        ['pred_x0', 'x_inter']
    """

    name = "sampling"
    loops_and_steps: tuple[str, ...] = ()  # published methods that the loop calls

    def __init__(self, model: Denoiser) -> None:
        check_overrides(self, self.loops_and_steps)
        self.model = model
        self.options = SamplingOptions()
        self.timesteps: np.ndarray | None = None
        self.start: int | None = None
        self.pair = Pairing()

    # -- methods of subclasses -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Reset the state of the previous run."""

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one reverse step from grid index `index`; return x at the next index and the estimate of x_start."""
        raise NotImplementedError

    # -- loop ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(
        self,
        shape: Sequence[int],
        timesteps: np.ndarray,
        cond: Conditioning,
        options: SamplingOptions,
        x_T: torch.Tensor | None = None,
        start: int | None = None,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Run the reverse process over the increasing grid `timesteps`, from its end to its start.

        Args:
            shape: (B, C, H, W) of the samples.
            timesteps: grid of model timesteps.
            cond: conditioning of the batch.
            options: see `SamplingOptions`.
            x_T: start noise (B, C, H, W); by default it is sampled.
            start: grid index to start from, by default the last. Without `x_T` the run starts from the option `x0`,
                noised to that timestep.

        Returns:
            The samples, and the intermediates `x_inter` and `pred_x0`: the start, then every `log_every_t`-th
            grid index and the last.

        Raises:
            UserError: the model predicts the noise, and the run visits a timestep with ᾱ = 0.
            ValueError: `ucg_schedule` has another number of scales than the run has steps.
        """
        self.options, self.timesteps, self.start = options, timesteps, start
        visited = torch.as_tensor(timesteps[: self.start_index + 1], device=self.model.alphas_cumprod.device)
        check_signal(self.model.parameterization, self.model.alphas_cumprod[visited])
        self.begin()
        if x_T is None:
            x_T = self.sample_noise(shape) if start is None else self.noised_x0(shape)
        x = x_T.to(self.model.device)
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        total = self.start_index + 1
        if options.ucg_schedule is not None and len(options.ucg_schedule) != total:
            raise ValueError(f"ucg_schedule has {len(options.ucg_schedule)} scales for {total} steps")
        progress = tqdm(range(total), desc=self.name, total=total, disable=not options.verbose)
        for i in progress:
            index = self.start_index - i
            if options.ucg_schedule is not None:
                self.options = replace(options, unconditional_guidance_scale=float(options.ucg_schedule[i]))
            x = self.before_step(x, index)
            x, pred_x0 = self.step(x, index, cond)
            x = self.after_step(x, index)
            if options.callback:
                options.callback(i)
            if options.img_callback:
                options.img_callback(pred_x0, i)
            if index % options.log_every_t == 0 or index == self.start_index:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    @property
    def start_index(self) -> int:
        """Grid index that the run starts from."""
        return len(self._grid_of_run()) - 1 if self.start is None else self.start

    def _grid_of_run(self) -> np.ndarray:
        if self.timesteps is None:
            raise RuntimeError("a sampler has timesteps only during a run")
        return self.timesteps

    def before_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return the input of a step: x with the known region, noised to the timestep of `index`."""
        return self.blend(x, index)

    def after_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return the result of a step after post-processing; by default unchanged."""
        return x

    # -- parts of a step -------------------------------------------------------------------------------------

    def noised_x0(self, shape: Sequence[int]) -> torch.Tensor:
        """Return the option `x0`, noised to the timestep that the run starts from."""
        noise = self.sample_noise(shape)
        return self.model.q_sample(
            self.options.known_latent.to(noise), self.timesteps_at(noise, self.start_index), noise
        )

    def blend(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return x, with the known latent, noised to the timestep of `index`, where the mask is 1."""
        mask = self.options.mask
        if mask is None:
            return x
        noise = None if self.options.noise_sampler is None else self.sample_noise(x.shape)
        known = self.model.q_sample(self.options.known_latent.to(x), self.timesteps_at(x, index), noise)
        mask = mask.to(x)
        return known * mask + (1.0 - mask) * x

    def timestep(self, index: int) -> int:
        """Return the model timestep at grid index `index`."""
        return int(self._grid_of_run()[index])

    def timesteps_at(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return the model timestep at grid index `index` for the batch x, (B,) int64."""
        return torch.full((x.shape[0],), self.timestep(index), device=x.device, dtype=torch.long)

    def alpha_at(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return ᾱ at grid index `index` for the batch x, (B, 1, 1, 1)."""
        return extract_into_tensor(self.model.alphas_cumprod, self.timesteps_at(x, index), x.shape).to(x.dtype)

    def predict(
        self,
        x: torch.Tensor,
        index: int,
        cond: Conditioning,
        t: torch.Tensor | None = None,
        alpha: torch.Tensor | None = None,
    ) -> Prediction:
        """Return the model's prediction for x at grid index `index`, with guidance and score correction.

        Args:
            x: (B, C, H, W).
            index: grid index.
            cond: conditioning of the batch.
            t: timesteps (B,) that the model sees, by default those of `index`.
            alpha: ᾱ of x (B, 1, 1, 1), by default that of `index`.
        """
        options, model = self.options, self.model
        t = self.timesteps_at(x, index) if t is None else t
        inputs = x.to(getattr(model, "dtype", x.dtype))
        if options.guided:
            # Classifier-free guidance, arXiv:2207.12598: one forward pass for both halves of the batch.
            both = self.pair(options.unconditional_conditioning, cond)
            output = model.apply_model(torch.cat([inputs] * 2), torch.cat([t] * 2), both).to(x.dtype)
            unconditional, conditional = output.chunk(2)
            output = unconditional + options.unconditional_guidance_scale * (conditional - unconditional)
        else:
            output = model.apply_model(inputs, t, cond).to(x.dtype)
        if options.score_corrector is not None:
            if model.parameterization != "eps":
                raise ValueError("score correction needs a model that predicts the noise")
            arguments = options.corrector_kwargs or {}
            output = options.score_corrector.modify_score(model, output, x, t, cond, **arguments)
        return interpret(model.parameterization, output, x, self.alpha_at(x, index) if alpha is None else alpha)

    def quantized(self, x_start: torch.Tensor) -> torch.Tensor:
        """Return the estimate, quantized with the codebook of the first stage if `quantize_x0` is set."""
        if not self.options.quantize_x0:
            return x_start
        return cast(LatentDenoiser, self.model).first_stage_model.quantize(x_start)[0]

    def sample_noise(self, shape: Sequence[int], repeat: bool = False) -> torch.Tensor:
        """Sample noise of `shape` (B, C, H, W) on the model's device; with `repeat`, the same for the whole batch."""
        device = self.model.device
        if self.options.noise_sampler is None:
            return noise_like(shape, device, repeat)
        noise = self.options.noise_sampler((1, *shape[1:]) if repeat else tuple(shape)).to(device)
        return noise.expand(*shape)

    def noise(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return the noise of one step, sampled or given, after temperature and dropout."""
        options = self.options
        if options.normals_sequence is not None:
            noise = options.normals_sequence[self.start_index - index].to(x)
        else:
            noise = self.sample_noise(x.shape, options.repeat_noise)
        temperature = options.temperature
        if not isinstance(temperature, (int, float)):
            temperature = temperature[self.timestep(index)]
        noise = noise * temperature
        if options.noise_dropout > 0.0:
            noise = torch.nn.functional.dropout(noise, p=options.noise_dropout)
        return noise


class GridSampler(Sampler):
    """Base class of samplers on a subset of the model's timesteps, with the published `sample(S, batch_size, shape)`.

    Example:
        Classifier-free guidance moves the samples beyond the conditional ones, away from the unconditional ones:

        >>> from ldm.models.diffusion.ddim import DDIMSampler
        >>> class PointMass:  # exact denoiser of data whose pixels all equal the conditioning
        ...     parameterization, num_timesteps, device = "x0", 1000, torch.device("cpu")
        ...     alphas_cumprod = torch.linspace(1.0, 0.001, 1001)[1:]
        ...
        ...     def apply_model(self, x_noisy, t, cond):
        ...         return cond.view(-1, 1, 1, 1).expand(x_noisy.shape)
        ...
        ...     def q_sample(self, x_start, t, noise=None):
        ...         alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        ...         return alpha.sqrt() * x_start + (1 - alpha).sqrt() * noise
        >>> sampler, cond, uncond = DDIMSampler(PointMass()), torch.full((4, 1), 0.5), torch.zeros(4, 1)
        >>> samples, _ = sampler.sample(50, 4, (3, 8, 8), cond, verbose=False)
        >>> guidance = {"unconditional_guidance_scale": 2.0, "unconditional_conditioning": uncond}
        >>> guided, _ = sampler.sample(50, 4, (3, 8, 8), cond, verbose=False, **guidance)
        >>> round(samples.mean().item(), 1), round(guided.mean().item(), 1)
        (0.5, 1.0)

        Image to image (SDEdit) runs only a share of the steps:

        >>> steps = []
        >>> options = {"x0": torch.ones(4, 3, 8, 8), "callback": steps.append, "verbose": False}
        >>> _ = sampler.sample(50, 4, (3, 8, 8), cond, strength=0.6, **options)
        >>> len(steps)
        30
    """

    own_grid = "exact"  # name of the default grid
    own_loop: str | None = None  # published name of the loop; None for a sampler without one

    ddpm_num_timesteps = OfModel("num_timesteps")
    alphas_cumprod = OfModel("alphas_cumprod")
    alphas_cumprod_prev = OfModel("alphas_cumprod_prev")
    betas = OfModel("betas")
    sqrt_alphas_cumprod = OfModel("sqrt_alphas_cumprod")
    sqrt_one_minus_alphas_cumprod = OfModel("sqrt_one_minus_alphas_cumprod")
    log_one_minus_alphas_cumprod = OfModel("log_one_minus_alphas_cumprod")
    sqrt_recip_alphas_cumprod = OfModel("sqrt_recip_alphas_cumprod")
    sqrt_recipm1_alphas_cumprod = OfModel("sqrt_recipm1_alphas_cumprod")

    def __init__(self, model: Denoiser, schedule: str = "linear", **kwargs: Any) -> None:
        super().__init__(model)
        self.schedule = schedule
        self.ddim_timesteps: np.ndarray = np.empty(0, np.int64)

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set an attribute; a tensor is copied to the model's device."""
        setattr(self, name, attr.to(self.model.device) if isinstance(attr, torch.Tensor) else attr)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Set the grid `ddim_timesteps` and the sampler's tables on it; see `schedule.make_ddim_timesteps`."""
        raise NotImplementedError

    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Sequence[torch.Tensor] | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: torch.Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Conditioning = None,
        dynamic_threshold: Any = None,
        ucg_schedule: Sequence[float] | None = None,
        *,
        x_t: torch.Tensor | None = None,
        ddim_discretize: str | None = None,
        strength: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Generate `batch_size` samples in S steps.

        Args:
            S: number of steps, 1 to T.
            batch_size: number of samples.
            shape: (C, H, W) of one sample.
            conditioning: conditioning of the samples; its batch size must be `batch_size`.
            eta: η of arXiv:2010.02502; 0 is deterministic, 1 adds as much noise as DDPM.
            x_T: start noise (B, C, H, W); by default it is sampled.
            x_t: another name of `x_T`.
            ddim_discretize: name of the grid, see `schedule.make_ddim_timesteps`; "uniform" is the published one. By
                default it is the model's `timestep_spacing`, or else the sampler's own.
            strength: run only the steps of the grid below this share of the model's timesteps, in (0, 1]. The run
                starts from `x_T` or, without it, from the option `x0`, noised to the first of these steps (SDEdit,
                arXiv:2108.01073).
            callback, normals_sequence, img_callback, quantize_x0, mask, x0: see `SamplingOptions`.
            temperature, noise_dropout, score_corrector, corrector_kwargs, verbose, log_every_t: see there.
            unconditional_guidance_scale, unconditional_conditioning, dynamic_threshold, ucg_schedule: see there.
            **options: other fields of `SamplingOptions`.

        Returns:
            (samples (B, C, H, W), intermediates): see `Sampler.run`.

        Raises:
            TypeError: an unknown option, or `callback` is not a function.
            UserError: there is no such grid, or see `Sampler.run`.
            ValueError: the conditioning has another batch size, or `strength` has no start.
        """
        cond_batch_size = batch_size_of(conditioning)
        if cond_batch_size not in (None, batch_size):
            raise ValueError(f"conditioning for {cond_batch_size} samples, but batch_size is {batch_size}")
        sampling_options = SamplingOptions(
            mask=mask,
            x0=x0,
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize_x0=quantize_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            ucg_schedule=ucg_schedule,
            dynamic_threshold=dynamic_threshold,
            normals_sequence=normals_sequence,
            callback=callback,
            img_callback=img_callback,
            log_every_t=log_every_t,
            verbose=verbose,
            **options,
        )
        grid = {} if ddim_discretize is None else {"ddim_discretize": ddim_discretize}
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose, **grid)
        start = None if strength is None else self.position(strength)
        x_T = x_t if x_T is None else x_T
        if start is not None and x_T is None and sampling_options.x0 is None:
            raise ValueError("strength needs something to start from: x0, or x_T")
        return self._run_loop((batch_size, *shape), conditioning, sampling_options, x_T, start)

    def _run_loop(
        self,
        shape: Sequence[int],
        cond: Conditioning,
        options: SamplingOptions,
        x_T: torch.Tensor | None,
        start: int | None,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Run the loop under its published name with its published arguments, so that a subclass can override it."""
        if self.own_loop is None:
            return self.run(shape, self.ddim_timesteps, cond, options, x_T, start)
        self.options, self.start = options, start  # what the published arguments do not state
        arguments: dict[str, Any] = {"callback": options.callback, "img_callback": options.img_callback}
        arguments |= {"mask": options.mask, "x0": options.x0, "x_T": x_T, "log_every_t": options.log_every_t}
        if options.ucg_schedule is not None:
            arguments["ucg_schedule"] = options.ucg_schedule
        try:
            return getattr(self, self.own_loop)(
                cond, shape, ddim_use_original_steps=False, **arguments, **self.step_arguments()
            )
        finally:
            self.options, self.timesteps, self.start = SamplingOptions(), None, None

    def step_arguments(self) -> dict[str, Any]:
        """Return the options of the run as the published arguments of a step."""
        options = self.options
        arguments = {
            "quantize_denoised": options.quantize_x0,
            "temperature": options.temperature,
            "noise_dropout": options.noise_dropout,
            "score_corrector": options.score_corrector,
            "corrector_kwargs": options.corrector_kwargs,
            "unconditional_guidance_scale": options.unconditional_guidance_scale,
            "unconditional_conditioning": options.unconditional_conditioning,
        }
        # The first published samplers do not have this one.
        return (
            arguments
            if options.dynamic_threshold is None
            else arguments | {"dynamic_threshold": options.dynamic_threshold}
        )

    def position(self, strength: float) -> int:
        """Return the last index of the grid below the share `strength` of the model's timesteps, or 0.

        Raises:
            ValueError: the share is outside (0, 1].
        """
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength is a share of the steps, above 0 and at most 1, not {strength}")
        # In floating point 0.7 × 1000 may exceed 700, which would add a step.
        end = round(strength * self.model.num_timesteps, 6)
        return max(int((self.ddim_timesteps < end).sum()) - 1, 0)

    def grid(self, S: int, ddim_discretize: str | None, eta: float = 0.0) -> tuple[np.ndarray, ...]:
        """Return the increasing grid of S model timesteps, and σ, ᾱ and the following ᾱ of their steps; each (S,)."""
        name = ddim_discretize or getattr(self.model, "timestep_spacing", None) or self.own_grid
        alphas_cumprod = self.exact_alphas_cumprod
        timesteps = make_ddim_timesteps(name, S, self.model.num_timesteps, alphas_cumprod=alphas_cumprod)
        # The "trailing" grid counts back from T - 1, so that its last step ends before timestep 0: at the data.
        ends_at_data = name == "trailing"
        return timesteps, *make_ddim_sampling_parameters(alphas_cumprod, timesteps, eta, ends_at_data=ends_at_data)

    @property
    def exact_alphas_cumprod(self) -> np.ndarray:
        """ᾱ at every timestep of the model, (T,) float64."""
        return self.model.alphas_cumprod.cpu().double().numpy()
