"""Diffusion models: the network, what it is conditioned on, and its loss.

The schedule that a model carries is its base `DiffusionProcess`, the latent space it lives in `LatentSpace`.

Shapes: images x (B, C, H, W) in [-1, 1]; latents z (B, c, h, w); steps t (B,) int64 from 0 to T - 1.

The models are plain modules. `ldm.training.modules` trains them; the samplers beside this file draw from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError, did_you_mean
from ldm.io.checkpoint.loading import load_weights
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.pixels import batch_entry, batch_images
from ldm.models.diffusion import preview
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.conditioning import Conditioning, DiffusionWrapper, as_dict, map_tensors, slice_batch
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.latent_space import LatentSpace
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.sampler import SamplingOptions
from ldm.models.diffusion.tiling import tiled_predict
from ldm.modules.diffusionmodules.parameterization import PARAMETERIZATIONS, training_target
from ldm.modules.diffusionmodules.schedule import (
    extract_into_tensor,
    lvlb_weights,
    make_beta_schedule,
    min_snr_weights,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.encoders.layout import LayoutTokens
from ldm.modules.frozen import freeze
from ldm.util import default

# Where a batch carries moments that the first stage computed earlier: (B, 2c, h, w), mean and log-variance.
LATENT_KEY = "latent_moments"
# Where a batch carries what the conditioning stage said earlier: (B, c', h, w).
CONDITIONING_KEY = "conditioning"
# What in-painting is conditioned on: pictures with black in place of what to fill, and where that is.
MASKED_KEY, MASK_KEY = "masked_image", "mask"
# Where a batch carries layouts: the tokens of `encoders.layout`, (B, L) int64.
LAYOUT_KEY = "coordinates_bbox"
LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target) ** 2,
}


class DDPM(DiffusionProcess):
    """A diffusion model of images (arXiv:2006.11239).

    Parameters are those of the published configurations, and `min_snr_gamma`: the γ by which arXiv:2303.09556
    weights the simple loss. `base_learning_rate` stands beside them in YAML; the trainer turns it into
    `learning_rate`.

    Raises:
        UserError: an unknown schedule, parameterization, loss or conditioning key, or γ not above 0.
    """

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        min_snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        _one_of("parameterization", parameterization, PARAMETERIZATIONS)
        _one_of("loss_type", loss_type, tuple(LOSSES))
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.use_positional_encodings = use_positional_encodings
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.learning_rate = 1e-4
        self.monitor = monitor
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self._register_loss_weights(self.register_schedule(betas, v_posterior), min_snr_gamma)
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        # Not a buffer: published checkpoints hold it only where it is learned.
        self.logvar = nn.Parameter(logvar) if learn_logvar else logvar
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    # -- schedule --------------------------------------------------------------------------------------------

    def _register_loss_weights(self, tables: Mapping[str, np.ndarray], min_snr_gamma: float | None) -> None:
        """The weights (T,) of the variational bound's loss, and those of the simple one: 1 without γ."""
        weights = np.ones(self.num_timesteps)
        if min_snr_gamma is not None:
            weights = min_snr_weights(tables["alphas_cumprod"], min_snr_gamma, self.parameterization)
        self.register_table("lvlb_weights", lvlb_weights(tables, self.parameterization), persistent=False)
        self.register_table("loss_weights", weights, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DDPM:
        super()._apply(fn, recurse)
        if not self.learn_logvar:
            self.logvar = self.logvar.to(self.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the denoising network's weights."""
        return next(self.model.parameters()).dtype

    # -- weights ---------------------------------------------------------------------------------------------

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a checkpoint: all of them, or with `only_model` the denoising network's.

        Raises:
            UserError: the file cannot be read or holds another model.
        """
        weights = read_state_dict(path)
        if only_model:
            weights = {name[6:]: value for name, value in weights.items() if name.startswith("model.")} or weights
        report = load_weights(self.model if only_model else self, weights, ignore_keys, source=f'"{path}"')
        if self.use_ema and (only_model or any(name.startswith("model_ema.") for name in report.missing)):
            self.model_ema.restart(self.model)  # a file without averages: they start at its weights

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run with the averaged weights, where the model keeps them."""
        with self.model_ema.swapped(self.model) if self.use_ema else nullcontext():
            yield

    def update_ema(self) -> None:
        """Take the present weights into the average; after every optimizer step."""
        if self.use_ema:
            self.model_ema(self.model)

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """What the optimizer trains."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    # -- loss ------------------------------------------------------------------------------------------------

    def get_loss(self, pred: torch.Tensor, target: torch.Tensor, mean: bool = True) -> torch.Tensor:
        """The `loss_type` distance, its mean or its elements."""
        loss = LOSSES[self.loss_type](pred, target)
        return loss.mean() if mean else loss

    def p_losses(
        self, x_start: torch.Tensor, cond: Conditioning, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss at steps t, and what to log of it.

        The simple loss (equation 14), weighted by `min_snr_gamma` and a learned or fixed variance per step, plus
        `original_elbo_weight` times the variational bound.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        alpha = extract_into_tensor(self.alphas_cumprod, t, x_start.shape)
        target = training_target(self.parameterization, x_start, noise, alpha)
        each = self.get_loss(output, target, mean=False).mean(dim=(1, 2, 3))
        prefix = "train" if self.training else "val"
        log = {f"{prefix}/loss_simple": each.mean()}
        logvar = self.logvar[t]
        loss = self.loss_weights[t] * each / logvar.exp() + logvar
        if self.learn_logvar:
            log[f"{prefix}/loss_gamma"] = loss.mean()
            log["logvar"] = self.logvar.data.mean()
        loss_vlb = (self.lvlb_weights[t] * each).mean()
        log[f"{prefix}/loss_vlb"] = loss_vlb
        loss = self.l_simple_weight * loss.mean() + self.original_elbo_weight * loss_vlb
        log[f"{prefix}/loss"] = loss
        return loss, log

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """The network's prediction for x_noisy (B, C, H, W) at steps t."""
        return self.model(x_noisy, t, **as_dict(cond, self.model.conditioning_key))

    def get_input(self, batch: Mapping[str, Any], k: str) -> torch.Tensor:
        """Entry `k` of a batch as float (B, C, H, W); datasets give (B, H, W, C) or (B, H, W)."""
        return batch_images(batch, k).to(self.device)

    def get_x_start(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The clean x_0 (B, C, h, w) of a batch, whatever it is conditioned on."""
        return self.get_input(batch, self.first_stage_key)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch at random steps."""
        return self(self.get_input(batch, self.first_stage_key))

    def forward(self, x: torch.Tensor, c: Conditioning = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss at random steps."""
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, c, t)

    def before_training_batch(self, batch: Mapping[str, Any], is_first: bool) -> None:
        """Called by the trainer before every batch; `is_first` on the very first of a fresh run."""

    # -- sampling --------------------------------------------------------------------------------------------

    def p_sample_loop(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: torch.Tensor | None = None,
        timesteps: int | None = None,
        start_T: int | None = None,
        **options: Any,
    ) -> Any:
        """Ancestral sampling of `shape` (B, C, H, W) over all steps, or the first `timesteps` of them.

        Options are fields of `SamplingOptions`. Returns the sample, and with `return_intermediates` the list of
        x_t it came through.
        """
        sample, intermediates = self._ancestral(cond, shape, x_T, timesteps, start_T, options)
        return (sample, intermediates["x_inter"]) if return_intermediates else sample

    def progressive_denoising(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        batch_size: int | None = None,
        x_T: torch.Tensor | None = None,
        start_T: int | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Ancestral sampling that returns the sample and its estimates of x_0 along the way.

        `shape` is (C, H, W) with `batch_size`, (B, C, H, W) without.
        """
        shape = (batch_size, *shape) if batch_size is not None else tuple(shape)
        sample, intermediates = self._ancestral(cond, shape, x_T, None, start_T, options)
        return sample, intermediates["pred_x0"][1:]

    def _ancestral(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: torch.Tensor | None,
        timesteps: int | None,
        start_T: int | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        steps = min(default(timesteps, self.num_timesteps), default(start_T, self.num_timesteps))
        settings = SamplingOptions(**{"log_every_t": self.log_every_t, **options})
        return AncestralSampler(self, self.clip_denoised).run(shape, np.arange(steps), cond, settings, x_T)

    def sample(
        self,
        cond: Conditioning = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        shape: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Ancestral samples (batch_size, C, H, W) for the first `batch_size` items of the conditioning."""
        shape = default(shape, (batch_size, self.channels, self.image_size, self.image_size))
        return self.p_sample_loop(slice_batch(cond, batch_size), shape, return_intermediates, **options)

    def sample_log(
        self, cond: Conditioning, batch_size: int, ddim: bool, ddim_steps: int, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        """Samples and intermediates, by DDIM or ancestrally, as previews want them."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **options)
        shape = (self.channels, self.image_size, self.image_size)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, slice_batch(cond, batch_size), **options)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, torch.Tensor]:
        """Pictures (B, C, H, W) in [-1, 1] that show what the model does with a batch; see `preview`."""
        return preview.pixel_previews(self, batch, N, **options)


class LatentDiffusion(LatentSpace, DDPM):
    """A diffusion model of the latents of a first stage, optionally conditioned (arXiv:2112.10752).

    Args:
        first_stage_config: the autoencoder; frozen.
        cond_stage_config: the encoder of the conditioning, `__is_first_stage__` or `__is_unconditional__`.
        num_timesteps_cond: more than 1 noises the conditioning itself, over so many steps.
        cond_stage_key: entry of the batch that conditions.
        cond_stage_trainable: train the encoder along with the denoising network.
        concat_mode: without a `conditioning_key`, join the conditioning to the input (else by cross-attention).
        cond_stage_forward: name of the encoder's method to call instead of `encode`.
        scale_factor: latents are multiplied by it; a buffer when `scale_by_std` sets it to one over the standard
            deviation of the first training batch's latents.
        cond_dropout: share of training items whose conditioning is replaced by the empty one ("" for text, the
            last class for classes, zeros otherwise), which classifier-free guidance needs (arXiv:2207.12598).
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        cond_dropout: float = 0.0,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        if not 0.0 <= cond_dropout < 1.0:
            raise UserError(f"cond_dropout must lie in [0, 1), got {cond_dropout}")
        self.cond_dropout = cond_dropout
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.clip_denoised = False  # latents have no fixed range
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_table("scale_factor", scale_factor)
        else:
            self.scale_factor = scale_factor
        self._register_cond_schedule(default(num_timesteps_cond, 1))
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self.cond_stage_model = self._build_cond_stage(cond_stage_config)
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def _register_cond_schedule(self, num_timesteps_cond: int) -> None:
        self.num_timesteps_cond = num_timesteps_cond
        self.shorten_cond_schedule = num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            ids = torch.full((self.num_timesteps,), self.num_timesteps - 1, dtype=torch.long)
            ids[:num_timesteps_cond] = torch.linspace(0, self.num_timesteps - 1, num_timesteps_cond).round().long()
            self.register_buffer("cond_ids", ids, persistent=False)

    def _build_cond_stage(self, config: Mapping[str, Any] | str) -> nn.Module | None:
        if config == "__is_first_stage__":
            return self.first_stage_model
        model = instantiate_from_config(config)
        return model if model is None or self.cond_stage_trainable else freeze(model)

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """The network's prediction for x_noisy (B, C, H, W) at steps t; tiled where `split_input_params` says so.

        What is joined to the input is cut into the same tiles; other conditioning serves every tile.
        """
        if not self.split_input_params:
            return super().apply_model(x_noisy, t, cond)
        given = as_dict(cond, self.model.conditioning_key)
        return tiled_predict(self.model, x_noisy, t, given, self.split_input_params)

    # -- conditioning ----------------------------------------------------------------------------------------

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode captions, labels or images with the conditioning stage.

        Masked images {`masked_image`: (B, 3, H, W), `mask`: (B, 1, H, W) of -1 and 1} are joined with their mask,
        resized to the map's size.
        """
        if isinstance(c, Mapping) and MASK_KEY in c:
            encoded = self.get_learned_conditioning(c[MASKED_KEY])
            mask = nn.functional.interpolate(c[MASK_KEY], size=encoded.shape[-2:])
            return torch.cat([encoded, mask.to(encoded)], dim=1)
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", None)
        encoded = encode(c) if callable(encode) else self.cond_stage_model(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def raw_conditioning(self, batch: Mapping[str, Any], cond_key: str | None = None) -> Any:
        """The part of a batch that conditions, not yet encoded."""
        key = default(cond_key, self.cond_stage_key)
        if key == "class_label":
            return {key: batch_entry(batch, key).to(self.device)}
        if key == LAYOUT_KEY:
            return batch_entry(batch, key).to(self.device)
        if key == "caption":
            return batch_entry(batch, key)
        if key == MASKED_KEY:
            return {name: self.get_input(batch, name) for name in (MASKED_KEY, MASK_KEY)}
        return self.get_input(batch, key)

    def drop_conditioning(self, xc: Any) -> Any:
        """`xc` with each item replaced by the empty conditioning with probability `cond_dropout`."""
        empty = self.empty_conditioning(xc)
        n = len(next(iter(xc.values()))) if isinstance(xc, Mapping) else len(xc)
        dropped = torch.rand(n, device=self.device) < self.cond_dropout
        if isinstance(xc, list):
            return [e if drop else x for drop, e, x in zip(dropped.tolist(), empty, xc, strict=True)]
        return map_tensors(lambda e, x: torch.where(dropped.reshape(-1, *[1] * (x.dim() - 1)), e, x), empty, xc)

    def empty_conditioning(self, xc: Any) -> Any:
        """What stands for no conditioning, in the form of `xc`: "" for text, the last class, zeros otherwise."""
        if isinstance(xc, Mapping) and MASK_KEY in xc:
            return map_tensors(torch.zeros_like, xc)
        if isinstance(xc, Mapping):
            known = getattr(self.cond_stage_model, "n_classes", None) or self.model.diffusion_model.num_classes
            return {key: torch.full_like(value, known - 1) for key, value in xc.items()}
        return torch.zeros_like(xc) if isinstance(xc, torch.Tensor) else [""] * len(xc)

    # -- training --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
    ) -> Any:
        """Scaled latents and conditioning of a batch, and on request images, reconstructions and raw conditioning.

        For keys other than `first_stage_key` the entry itself, as (B, C, H, W).
        """
        if k != self.first_stage_key:
            return super().get_input(batch, k)
        x, encoded = self._encoded_batch(batch, k, bs)
        z = self.get_first_stage_encoding(encoded).float()
        if x is None and return_first_stage_outputs:
            x = self.decode_first_stage(z)
        c = xc = None
        if self.model.conditioning_key is not None and CONDITIONING_KEY in batch:
            c = batch[CONDITIONING_KEY][:bs].to(self.device, torch.float32)
        elif self.model.conditioning_key is not None:
            xc = x if default(cond_key, self.cond_stage_key) == k else self.raw_conditioning(batch, cond_key)
            xc = xc if bs is None else {n: v[:bs] for n, v in xc.items()} if isinstance(xc, Mapping) else xc[:bs]
            if self.training and self.cond_dropout > 0:
                xc = self.drop_conditioning(xc)
            c = xc if self.cond_stage_trainable and not force_c_encode else self.get_learned_conditioning(xc)
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_original_cond:
            out.append(xc)
        return out

    @torch.no_grad()
    def get_x_start(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The scaled latents (B, c, h, w) of a batch, which needs no conditioning for it."""
        return self.get_first_stage_encoding(self._encoded_batch(batch, self.first_stage_key, None)[1]).float()

    def _encoded_batch(self, batch: Mapping[str, Any], k: str, bs: int | None) -> tuple[torch.Tensor | None, Any]:
        """Images (None where the batch carries moments instead) and what the first stage says of them."""
        if LATENT_KEY in batch:
            return None, DiagonalGaussianDistribution(batch[LATENT_KEY][:bs].to(self.device, torch.float32))
        x = super().get_input(batch, k)[:bs]
        return x, self.encode_first_stage(x.to(next(self.first_stage_model.parameters(), x).dtype))

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch at random steps."""
        z, c = self.get_input(batch, self.first_stage_key)
        return self(z, c)

    def forward(self, x: torch.Tensor, c: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of latents (B, c, h, w) at random steps; a trainable stage encodes `c` here, with gradients."""
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        if self.model.conditioning_key is not None:
            if c is None:
                raise ValueError(f'conditioning_key "{self.model.conditioning_key}" needs a conditioning')
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self.q_sample(x_start=c, t=self.cond_ids[t], noise=torch.randn_like(c.float()))
        return self.p_losses(x, c, t)

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """The denoising network, and the conditioning stage when it is trained too."""
        conditioning = list(self.cond_stage_model.parameters()) if self.cond_stage_trainable else []
        return [*super().optimizer_parameters(), *conditioning]

    @torch.no_grad()
    def before_training_batch(self, batch: Mapping[str, Any], is_first: bool) -> None:
        """On the first batch of a fresh run, set the scale of the latents where `scale_by_std` asks for it."""
        if not (self.scale_by_std and is_first and not self.restarted_from_ckpt):
            return
        if self.scale_factor != 1.0:
            raise UserError("scale_by_std sets the scale itself: leave scale_factor at 1.0")
        z = self.get_input(batch, self.first_stage_key)[0]
        self.scale_factor.copy_(1.0 / z.flatten().std())

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, torch.Tensor]:
        """Pictures (B, C, H, W) in [-1, 1] that show what the model does with a batch; see `preview`."""
        return preview.latent_previews(self, batch, N, **options)


class Layout2ImgDiffusion(LatentDiffusion):
    """A latent diffusion model of pictures that follow a layout of labelled boxes (arXiv:2112.10752, section 4.3.1).

    Args:
        cond_stage_key: must be "coordinates_bbox", the entry of the batch with the layouts' tokens.
        class_names: what previews call the classes, in their order; numbers beyond it.

    Raises:
        UserError: another `cond_stage_key`, or a conditioning stage that reads no tokens.
    """

    def __init__(self, cond_stage_key: str = LAYOUT_KEY, class_names: Sequence[str] = (), **kwargs: Any) -> None:
        if cond_stage_key != LAYOUT_KEY:
            raise UserError(f'Layout2ImgDiffusion needs the cond_stage_key "{LAYOUT_KEY}", not "{cond_stage_key}"')
        super().__init__(cond_stage_key=cond_stage_key, **kwargs)
        transformer = getattr(self.cond_stage_model, "transformer", None)
        if transformer is None or getattr(self.cond_stage_model, "use_tknz_fn", False):
            raise UserError("Layout2ImgDiffusion needs a cond_stage_config that reads tokens: use_tokenizer: false")
        self.layout_tokens = LayoutTokens(transformer.num_tokens)
        self.class_names = tuple(class_names)

    def class_name(self, label: int) -> str:
        """What previews call class `label`."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def empty_conditioning(self, xc: torch.Tensor) -> torch.Tensor:
        """Layouts like `xc` without any box."""
        return torch.full_like(xc, self.layout_tokens.none)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, torch.Tensor]:
        """Pictures (B, C, H, W) in [-1, 1] that show what the model does with a batch; see `preview`."""
        return preview.layout_previews(self, batch, N, **options)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f'{name} "{value}" is not known{did_you_mean(value, known)}; choose one of {", ".join(known)}')
