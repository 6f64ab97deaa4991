"""Sampling methods of the diffusion models, with the published parameters.

`AncestralSampler` and `DDIMSampler` implement them. Every ancestral run uses the `p_sample` and `p_mean_variance` of a
subclass that overrides them.

Shapes: x, x_T (B, C, H, W); timesteps t (B,) int64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.attributes import is_overridden
from ldm.models.diffusion.conditioning import Conditioning, slice_batch
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.sampler import SamplingOptions
from ldm.util import default

Steps = tuple[torch.Tensor, dict[str, list[torch.Tensor]]]


class AncestralMethods(DiffusionProcess):
    """Base of the mixins: one ancestral step, and the loop over steps."""

    parameterization: str
    p_sample: Callable[..., Any]
    p_mean_variance: Callable[..., Any]
    channels: int
    image_size: int
    log_every_t: int
    clip_denoised: bool

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """Return the network's prediction for x_noisy (B, C, H, W) at timesteps t."""
        raise NotImplementedError

    def _moments(
        self, x: torch.Tensor, c: Conditioning, t: torch.Tensor, clip_denoised: bool, options: SamplingOptions
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance and log-variance of p(x_{t-1} | x_t), and the estimate of x_0."""
        sampler = AncestralSampler(self, clip_denoised)
        sampler.options = options
        x_start = sampler.estimate(x, c, t)
        return *self.q_posterior(x_start=x_start, x_t=x, t=t), x_start

    def _previous(
        self,
        moments: Sequence[torch.Tensor],
        t: torch.Tensor,
        repeat_noise: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
    ) -> torch.Tensor:
        """Sample x_{t-1} from its moments; at timestep 0 return the mean."""
        mean, _, log_variance = moments[:3]
        sampler = AncestralSampler(self)
        noise = sampler.sample_noise(mean.shape, repeat_noise) * temperature
        if noise_dropout > 0.0:
            noise = nn.functional.dropout(noise, p=noise_dropout)
        is_last = (t == 0).reshape(-1, *[1] * (mean.dim() - 1))
        return torch.where(is_last, mean, mean + (0.5 * log_variance).exp() * noise)

    def overridden_step(self) -> Callable[..., Any] | None:
        """Return `ancestral_step` if a subclass overrides `p_sample` or `p_mean_variance`, else None."""
        overridden = is_overridden(self.p_sample) or is_overridden(self.p_mean_variance)
        return self.ancestral_step if overridden else None

    def ancestral_step(
        self, x: torch.Tensor, c: Conditioning, t: torch.Tensor, clip_denoised: bool, options: SamplingOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step with the method `p_sample`; return x_{t-1} and the estimate of x_0."""
        raise NotImplementedError

    @torch.no_grad()
    def _sample_ancestral(
        self, cond: Conditioning, shape: Sequence[int], x_T: torch.Tensor | None, steps: int, options: dict[str, Any]
    ) -> Steps:
        """Run the first `steps` timesteps; as published, the callbacks take the timestep, and the latter x_{t-1}."""
        sampler = AncestralSampler(self, self.clip_denoised)
        callback, img_callback = options.get("callback"), options.get("img_callback")
        options = {**options, "log_every_t": default(options.get("log_every_t"), self.log_every_t)}
        if callback is not None:
            options["callback"] = lambda i: callback(steps - 1 - i)
        if img_callback is not None:
            options["img_callback"] = lambda _, i: img_callback(sampler.x, steps - 1 - i)
        return sampler.run(shape, np.arange(steps), cond, SamplingOptions(**options), x_T)


class PixelSampling(AncestralMethods):
    """Mixin of `DDPM`: sampling without a conditioning."""

    def p_mean_variance(
        self, x: torch.Tensor, t: torch.Tensor, clip_denoised: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, variance and log-variance of p(x_{t-1} | x_t)."""
        return self._moments(x, None, t, clip_denoised, SamplingOptions())[:3]

    @torch.no_grad()
    def p_sample(
        self, x: torch.Tensor, t: torch.Tensor, clip_denoised: bool = True, repeat_noise: bool = False
    ) -> torch.Tensor:
        """Sample x_{t-1} for x_t; with `repeat_noise` all items share the noise."""
        return self._previous(self.p_mean_variance(x=x, t=t, clip_denoised=clip_denoised), t, repeat_noise)

    def ancestral_step(
        self, x: torch.Tensor, c: Conditioning, t: torch.Tensor, clip_denoised: bool, options: SamplingOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step with the method `p_sample`, which returns no estimate of x_0."""
        x = self.p_sample(x, t, clip_denoised=clip_denoised, repeat_noise=options.repeat_noise)
        return x, x

    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: torch.Tensor | None = None,
        timesteps: int | None = None,
        **options: Any,
    ) -> Any:
        """Sample `shape` (B, C, H, W) ancestrally, over all timesteps or the first `timesteps` of them.

        Options are fields of `SamplingOptions`. Returns the samples, and with `return_intermediates` the list of
        intermediate x_t.
        """
        steps = default(timesteps, self.num_timesteps)
        sample, intermediates = self._sample_ancestral(None, shape, x_T, steps, options)
        return (sample, intermediates["x_inter"]) if return_intermediates else sample

    def sample(self, batch_size: int = 16, return_intermediates: bool = False, **options: Any) -> Any:
        """Sample (batch_size, C, H, W) ancestrally; see `p_sample_loop`."""
        shape = (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(shape, return_intermediates=return_intermediates, **options)


class LatentSampling(AncestralMethods):
    """Mixin of `LatentDiffusion`: sampling with a conditioning."""

    def p_mean_variance(
        self,
        x: torch.Tensor,
        c: Conditioning,
        t: torch.Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Return mean, variance and log-variance of p(x_{t-1} | x_t, c), and with `return_x0` the estimate of x_0.

        Raises:
            ValueError: `return_codebook_ids` is set; no network returns a noise prediction and indices.
        """
        if return_codebook_ids:
            raise ValueError("the U-Net predicts either the noise or codebook indices; leave out return_codebook_ids")
        options = SamplingOptions(
            quantize_x0=quantize_denoised, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs
        )
        moments = self._moments(x, c, t, clip_denoised, options)
        return moments if return_x0 else moments[:3]

    @torch.no_grad()
    def p_sample(
        self,
        x: torch.Tensor,
        c: Conditioning,
        t: torch.Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Sample x_{t-1} for x_t; with `return_x0` also return the estimate of x_0.

        The arguments are those of `p_mean_variance`, and `repeat_noise`, `temperature` and `noise_dropout` of
        `SamplingOptions`.
        """
        moments = self.p_mean_variance(
            x=x,
            c=c,
            t=t,
            clip_denoised=clip_denoised,
            return_codebook_ids=return_codebook_ids,
            quantize_denoised=quantize_denoised,
            return_x0=return_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        x_prev = self._previous(moments, t, repeat_noise, temperature, noise_dropout)
        return (x_prev, moments[3]) if return_x0 else x_prev

    def ancestral_step(
        self, x: torch.Tensor, c: Conditioning, t: torch.Tensor, clip_denoised: bool, options: SamplingOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step with the method `p_sample`.

        Raises:
            ValueError: the run has guidance, of which `p_sample` knows nothing.
        """
        if options.guided:
            raise ValueError(f"{type(self).__name__} overrides p_sample, which has no guidance; sample with DDIM")
        temperature = options.temperature
        x_prev, x_start = self.p_sample(
            x,
            c,
            t,
            clip_denoised=clip_denoised,
            repeat_noise=options.repeat_noise,
            quantize_denoised=options.quantize_x0,
            return_x0=True,
            temperature=temperature if isinstance(temperature, (int, float)) else temperature[int(t[0])],
            noise_dropout=options.noise_dropout,
            score_corrector=options.score_corrector,
            corrector_kwargs=options.corrector_kwargs,
        )
        return x_prev, x_start

    def p_sample_loop(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: torch.Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
        **options: Any,
    ) -> Any:
        """Sample `shape` (B, C, H, W) ancestrally, over all timesteps or the first of them.

        Args:
            cond: conditioning of the batch.
            shape: (B, C, H, W).
            return_intermediates: also return the list of intermediate x_t.
            x_T: start noise; by default it is sampled.
            timesteps, start_T: number of timesteps to visit, the smaller of both.
            quantize_denoised: see `quantize_x0` of `SamplingOptions`.
            callback: called with the timestep.
            img_callback: called with x_{t-1} and the timestep.
            verbose, mask, x0, log_every_t: see `SamplingOptions`.
            **options: other fields of `SamplingOptions`.
        """
        steps = min(default(timesteps, self.num_timesteps), default(start_T, self.num_timesteps))
        options |= {"verbose": verbose, "callback": callback, "img_callback": img_callback, "mask": mask, "x0": x0}
        options |= {"log_every_t": log_every_t} | ({"quantize_x0": True} if quantize_denoised else {})
        sample, intermediates = self._sample_ancestral(cond, shape, x_T, steps, options)
        return (sample, intermediates["x_inter"]) if return_intermediates else sample

    def progressive_denoising(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[torch.Tensor, int], None] | None = None,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        batch_size: int | None = None,
        x_T: torch.Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Sample ancestrally; return the samples and the list of intermediate estimates of x_0.

        `shape` is (C, H, W) with `batch_size`, and (B, C, H, W) without it. The other arguments are those of
        `p_sample_loop`, and fields of `SamplingOptions`.
        """
        shape = (batch_size, *shape) if batch_size is not None else tuple(shape)
        options |= {"verbose": verbose, "callback": callback, "img_callback": img_callback, "mask": mask, "x0": x0}
        options |= {"temperature": temperature, "noise_dropout": noise_dropout, "log_every_t": log_every_t}
        options |= {"score_corrector": score_corrector, "corrector_kwargs": corrector_kwargs}
        options |= {"quantize_x0": True} if quantize_denoised else {}
        steps = min(default(start_T, self.num_timesteps), self.num_timesteps)
        sample, intermediates = self._sample_ancestral(cond, shape, x_T, steps, options)
        return sample, intermediates["pred_x0"][1:]

    def sample(
        self,
        cond: Conditioning,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: torch.Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: torch.Tensor | None = None,
        x0: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Sample `shape`, by default (batch_size, C, H, W), ancestrally for the first items of the conditioning.

        The other arguments are those of `p_sample_loop`.
        """
        shape = default(shape, (batch_size, self.channels, self.image_size, self.image_size))
        return self.p_sample_loop(
            slice_batch(cond, batch_size),
            shape,
            return_intermediates=return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
            **options,
        )

    @torch.no_grad()
    def sample_log(
        self, cond: Conditioning, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """Sample with DDIM or ancestrally; return the samples and the intermediates, for previews."""
        if not ddim:
            return self.sample(cond=cond, batch_size=batch_size, return_intermediates=True, **kwargs)
        shape = (self.channels, self.image_size, self.image_size)
        steps = cast(int, ddim_steps)  # None is for ancestral sampling
        return DDIMSampler(self).sample(steps, batch_size, shape, slice_batch(cond, batch_size), **kwargs)
