"""The reverse process: one loop for every sampler, and the guidance that goes with it.

A sampler sees its model through the small protocol `Denoiser`; it never imports one. Subclasses write `step`,
whose arithmetic is that of one reverse step, and choose the grid of steps.

Shapes: x, eps, x_start are (B, C, H, W), float32 whatever the precision of the model. Steps t count from 0.

Draws from the global generator, or from the option `draw`, in this order (it is behaviour: the same seed gives the
same picture): the start noise, which a known latent may be noised with (SDEdit, arXiv:2108.01073); then at every step,
with a mask, the noise of the known part, and the step's own noise, which the published samplers draw also where its
standard deviation is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from ldm.models.diffusion.conditioning import Conditioning, Pairing, batch_size_of
from ldm.modules.diffusionmodules.parameterization import Prediction, interpret
from ldm.modules.diffusionmodules.schedule import extract_into_tensor, make_ddim_timesteps, noise_like


class Denoiser(Protocol):
    """What a sampler needs of a model."""

    alphas_cumprod: torch.Tensor
    num_timesteps: int
    parameterization: str
    device: torch.device

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        """The model's prediction (B, C, H, W): what it is, `parameterization` says."""

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """x_start noised to the steps t, with `noise` or noise of its own."""


@dataclass
class SamplingOptions:
    """What a run may ask for beside its steps. Names are those of the published `sample`."""

    mask: torch.Tensor | None = None  # (B, 1 or C, H, W), 1 where x0 is kept
    x0: torch.Tensor | None = None  # (B, C, H, W), the known latent
    temperature: float | Sequence[float] = 1.0  # factor of the step noise; a sequence has one for every model step
    noise_dropout: float = 0.0
    quantize_x0: bool = False  # snap every estimate of x_start to the first stage's codebook
    repeat_noise: bool = False  # the same step noise for the whole batch
    score_corrector: Any = None  # has `modify_score`, such as `classifier.ClassifierGuidance`
    corrector_kwargs: dict[str, Any] = field(default_factory=dict)
    unconditional_guidance_scale: float = 1.0
    unconditional_conditioning: Conditioning = None
    normals_sequence: Sequence[torch.Tensor] | None = None  # the step noises, in the order of use
    noise_sampler: Callable[[Sequence[int]], torch.Tensor] | None = None  # returns noise of a shape, e.g. `SeededNoise`
    callback: Callable[[int], None] | None = None  # called with the number of the step, from 0
    img_callback: Callable[[torch.Tensor, int], None] | None = None  # with the estimate of x_start, too
    log_every_t: int = 100
    verbose: bool = True

    def __post_init__(self) -> None:
        if self.mask is not None and self.x0 is None:
            raise ValueError("a mask needs x0, the latent to keep where the mask is 1")

    @property
    def guided(self) -> bool:
        return self.unconditional_conditioning is not None and self.unconditional_guidance_scale != 1.0


class Sampler:
    """The loop. Subclasses provide `step` and may reset their state in `begin`."""

    name = "sampling"

    def __init__(self, model: Denoiser) -> None:
        self.model = model
        self.options = SamplingOptions()
        self.start: int | None = None
        self.pair = Pairing()

    # -- what subclasses write -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget the previous run."""

    def step(self, x: torch.Tensor, index: int, cond: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        """One reverse step from grid position `index` down: (x at the next position, estimate of x_start)."""
        raise NotImplementedError

    # -- the loop --------------------------------------------------------------------------------------------

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
        """Walk the increasing grid `timesteps` backwards from noise of `shape` (B, C, H, W).

        Args:
            x_T: (B, C, H, W) to start from instead.
            start: grid position to start from, by default the last; without `x_T` from the option `x0`, noised to it.

        Returns:
            The sample, and the intermediates `x_inter` and `pred_x0`: the start, then every `log_every_t`-th
            grid position and the last.
        """
        self.options, self.timesteps, self.start = options, timesteps, start
        self.begin()
        if x_T is None:
            x_T = self.sample_noise(shape) if start is None else self.noised(shape)
        x = x_T.to(self.model.device)
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        total = self.first + 1
        progress = tqdm(range(total), desc=self.name, total=total, disable=not options.verbose)
        for i in progress:
            index = self.first - i
            x = self.before_step(x, index)
            x, pred_x0 = self.step(x, index, cond)
            x = self.after_step(x, index)
            if options.callback:
                options.callback(i)
            if options.img_callback:
                options.img_callback(pred_x0, i)
            if index % options.log_every_t == 0 or index == self.first:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)
        return x, intermediates

    @property
    def first(self) -> int:
        """The grid position that the run starts from."""
        return len(self.timesteps) - 1 if self.start is None else self.start

    def before_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Put the known part, noised to the present step, in its place."""
        return self.blend(x, index)

    def after_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What is done to the result of a step; nothing by default."""
        return x

    def noised(self, shape: Sequence[int]) -> torch.Tensor:
        """The option `x0`, noised to the grid position that the run starts from."""
        noise = self.sample_noise(shape)
        return self.model.q_sample(self.options.x0.to(noise), self.steps_of(noise, self.first), noise)

    # -- what steps are made of ------------------------------------------------------------------------------

    def blend(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """`x` with the known latent, noised to grid position `index`, where the mask is 1."""
        mask = self.options.mask
        if mask is None:
            return x
        noise = None if self.options.noise_sampler is None else self.sample_noise(x.shape)
        known = self.model.q_sample(self.options.x0.to(x), self.steps_of(x, index), noise)
        mask = mask.to(x)
        return known * mask + (1.0 - mask) * x

    def steps_of(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The model's step at grid position `index`, (B,) int64."""
        return torch.full((x.shape[0],), int(self.timesteps[index]), device=x.device, dtype=torch.long)

    def predict(self, x: torch.Tensor, index: int, cond: Conditioning) -> Prediction:
        """What the model, guided and corrected as asked, says of `x` at grid position `index`."""
        options, model = self.options, self.model
        t = self.steps_of(x, index)
        inputs = x.to(getattr(model, "dtype", x.dtype))
        if options.guided:
            # Classifier-free guidance, arXiv:2207.12598: one pass over both halves.
            both = self.pair(options.unconditional_conditioning, cond)
            output = model.apply_model(torch.cat([inputs] * 2), torch.cat([t] * 2), both).to(x.dtype)
            unconditional, conditional = output.chunk(2)
            output = unconditional + options.unconditional_guidance_scale * (conditional - unconditional)
        else:
            output = model.apply_model(inputs, t, cond).to(x.dtype)
        if options.score_corrector is not None:
            if model.parameterization != "eps":
                raise ValueError("score correction needs a model that predicts the noise")
            output = options.score_corrector.modify_score(model, output, x, t, cond, **options.corrector_kwargs)
        alpha = extract_into_tensor(model.alphas_cumprod, t, x.shape).to(x.dtype)
        return interpret(model.parameterization, output, x, alpha)

    def quantized(self, x_start: torch.Tensor) -> torch.Tensor:
        """The estimate, snapped to the first stage's codebook when the run asks for it."""
        return self.model.first_stage_model.quantize(x_start)[0] if self.options.quantize_x0 else x_start

    def sample_noise(self, shape: Sequence[int], repeat: bool = False) -> torch.Tensor:
        """Fresh noise of `shape` (B, C, H, W) on the model's device; with `repeat`, the same for the whole batch."""
        device = self.model.device
        if self.options.noise_sampler is None:
            return noise_like(shape, device, repeat)
        noise = self.options.noise_sampler((1, *shape[1:]) if repeat else tuple(shape)).to(device)
        return noise.expand(*shape)

    def noise(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The noise of one step: drawn or given, then tempered and dropped out as asked."""
        options = self.options
        if options.normals_sequence is not None:
            noise = options.normals_sequence[self.first - index].to(x)
        else:
            noise = self.sample_noise(x.shape, options.repeat_noise)
        temperature = options.temperature
        if not isinstance(temperature, (int, float)):
            temperature = temperature[int(self.timesteps[index])]
        noise = noise * temperature
        if options.noise_dropout > 0.0:
            noise = torch.nn.functional.dropout(noise, p=options.noise_dropout)
        return noise


class GridSampler(Sampler):
    """A sampler on a subset of the model's steps: the published `sample(S, batch_size, shape, …)`."""

    own_grid = "exact"  # the grid where none is asked for

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the grid and the tables that go with it; see `schedule.make_ddim_timesteps`."""
        raise NotImplementedError

    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Conditioning = None,
        eta: float = 0.0,
        x_T: torch.Tensor | None = None,
        ddim_discretize: str | None = None,
        strength: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        """Draw `batch_size` samples in S steps.

        Args:
            S: number of steps, 1 .. T.
            shape: (C, H, W) of one sample.
            conditioning: what to sample from; its batch must be `batch_size`.
            eta: η of arXiv:2010.02502: 0 is deterministic, 1 adds DDPM's noise.
            x_T: (B, C, H, W) start noise instead of drawn noise.
            ddim_discretize: the grid instead of the sampler's own; "uniform" is the published one.
            strength: walk only the grid's steps below this share of the model's, in (0, 1], from `x_T` or, without
                it, from the option `x0` noised to the first of them (SDEdit, arXiv:2108.01073).
            **options: fields of `SamplingOptions`; an unknown one is a TypeError.

        Returns:
            (samples (B, C, H, W), intermediates): see `Sampler.run`.
        """
        conditioned = batch_size_of(conditioning)
        if conditioned not in (None, batch_size):
            raise ValueError(f"conditioning for {conditioned} samples, but batch_size is {batch_size}")
        self.make_schedule(S, ddim_discretize, eta)
        settings = SamplingOptions(**options)
        start = None if strength is None else self.position(strength)
        if start is not None and x_T is None and settings.x0 is None:
            raise ValueError("strength needs something to start from: x0, or x_T")
        return self.run((batch_size, *shape), self.ddim_timesteps, conditioning, settings, x_T, start)

    def position(self, strength: float) -> int:
        """The last position of the grid below the share `strength` of the model's steps, or 0.

        Raises:
            ValueError: the share is outside (0, 1].
        """
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength is a share of the steps, above 0 and at most 1, not {strength}")
        # Of floats alone 0.7 × 1000 may lie above 700, and one step more would be walked.
        end = round(strength * self.model.num_timesteps, 6)
        return max(int((self.ddim_timesteps < end).sum()) - 1, 0)

    def grid(self, S: int, ddim_discretize: str | None) -> np.ndarray:
        """The increasing grid of S model steps."""
        name = self.own_grid if ddim_discretize is None else ddim_discretize
        return make_ddim_timesteps(name, S, self.model.num_timesteps, alphas_cumprod=self.alphas_cumprod)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ at every step of the model, (T,) float64."""
        return self.model.alphas_cumprod.cpu().double().numpy()
