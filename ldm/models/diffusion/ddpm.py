"""Diffusion models: the denoising network, its conditioning and its loss.

The models are plain modules. `DiffusionProcess` implements their noise schedule, `LatentSpace` their first stage and
`ConditioningStage` the encoder of their conditioning. `ldm.training.modules` trains them.

Shapes: images x (B, C, H, W) in [-1, 1]; latents z (B, c, h, w); timesteps t (B,) int64 from 0 to T - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError, did_you_mean
from ldm.io.checkpoint.loading import EMA_PREFIX, load_weights
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.pixels import batch_images
from ldm.models.diffusion import preview
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.batch_keys import CONDITIONING_KEY, LATENT_KEY, LAYOUT_KEY
from ldm.models.diffusion.conditioning import Conditioning, DiffusionWrapper, as_dict, slice_batch
from ldm.models.diffusion.conditioning_stage import ConditioningStage
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
from ldm.modules.ema import EmaMixin, LitEma
from ldm.modules.encoders.layout import LayoutTokens
from ldm.modules.frozen import freeze
from ldm.util import default

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target) ** 2,
}


class DDPM(EmaMixin, DiffusionProcess):
    """Diffusion model of images (arXiv:2006.11239).

    The parameters are those of the published configurations, plus `min_snr_gamma`. The `base_learning_rate` of a YAML
    configuration is not a parameter: the trainer derives `learning_rate` from it.

    Args:
        unet_config: target and parameters of the denoising network.
        timesteps: number of timesteps T.
        beta_schedule: "linear", "cosine", "sqrt_linear" or "sqrt"; see `make_beta_schedule`.
        loss_type: "l1" or "l2".
        ckpt_path: checkpoint to start from; see `init_from_ckpt` for `ignore_keys` and `load_only_unet`.
        monitor: name of the logged value that selects the checkpoints to keep.
        use_ema: keep a moving average of the weights.
        first_stage_key: entry of a batch that holds the images.
        image_size: height and width of a sample, or of its latent.
        channels: channels of a sample, or of its latent.
        log_every_t: distance of the timesteps that previews show.
        clip_denoised: clamp estimates of x_start to [-1, 1] in ancestral sampling.
        linear_start, linear_end, cosine_s: parameters of the schedule.
        given_betas: betas (T,) to use instead of a schedule.
        original_elbo_weight: weight of the variational bound in the loss.
        v_posterior: v in the posterior variance (1 - v) β̃_t + v β_t.
        l_simple_weight: weight of the simple loss.
        conditioning_key: see `DiffusionWrapper`.
        parameterization: prediction of the network: "eps", "x0" or "v".
        scheduler_config: learning rate schedule, for the trainer.
        use_positional_encodings: accepted for published configurations; has no effect.
        learn_logvar: learn a log-variance of the loss for each timestep, from `logvar_init`.
        min_snr_gamma: γ of the weights of the simple loss (arXiv:2303.09556); None for equal weights.

    Raises:
        UserError: an unknown schedule, parameterization, loss or conditioning key, or γ is not above 0.
    """

    # `instantiate_from_config` stores the configuration that it built the model from in `config`.
    records_config = True
    config: Mapping[str, Any] | None = None

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
        _check_known("parameterization", parameterization, PARAMETERIZATIONS)
        _check_known("loss_type", loss_type, tuple(LOSSES))
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.use_positional_encodings = use_positional_encodings
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.learning_rate = 1e-4
        self.monitor = monitor
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        if given_betas is None:
            given_betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        tables = self.register_schedule(np.asarray(given_betas, dtype=np.float64), v_posterior)
        self._register_loss_weights(tables, min_snr_gamma)
        self._init_logvar(learn_logvar, logvar_init)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    # -- schedule --------------------------------------------------------------------------------------------

    def _register_loss_weights(self, tables: Mapping[str, np.ndarray], min_snr_gamma: float | None) -> None:
        """Register the weights (T,) of the variational bound and of the simple loss, which are 1 without γ."""
        weights = np.ones(self.num_timesteps)
        if min_snr_gamma is not None:
            weights = min_snr_weights(tables["alphas_cumprod"], min_snr_gamma, self.parameterization)
        self.register_table("lvlb_weights", lvlb_weights(tables, self.parameterization), persistent=False)
        self.register_table("loss_weights", weights, persistent=False)

    def _init_logvar(self, learn_logvar: bool, logvar_init: float) -> None:
        self.learn_logvar = learn_logvar
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        # Not a buffer: published checkpoints contain it only if it is learned.
        self.logvar = nn.Parameter(logvar) if learn_logvar else logvar

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DDPM:
        super()._apply(fn, recurse)
        if not self.learn_logvar:
            self.logvar = self.logvar.to(self.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the denoising network."""
        return next(self.model.parameters()).dtype

    # -- weights ---------------------------------------------------------------------------------------------

    @property
    def averaged_module(self) -> nn.Module:
        """Module whose weights are averaged: the denoising network."""
        return self.model

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load weights from a checkpoint: all of them, or with `only_model` those of the denoising network.

        Args:
            path: checkpoint file.
            ignore_keys: prefixes of the names to skip.
            only_model: load the denoising network only.

        Raises:
            UserError: the file cannot be read or holds another model.
        """
        weights = read_state_dict(path)
        if only_model:
            weights = {name[6:]: value for name, value in weights.items() if name.startswith("model.")} or weights
        report = load_weights(self.model if only_model else self, weights, ignore_keys, source=f'"{path}"')
        if only_model or any(name.startswith(EMA_PREFIX) for name in report.missing):
            self.restart_ema()

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer trains."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    # -- loss ------------------------------------------------------------------------------------------------

    def get_loss(self, pred: torch.Tensor, target: torch.Tensor, mean: bool = True) -> torch.Tensor:
        """Return the `loss_type` distance: its mean, or with `mean=False` its elements."""
        loss = LOSSES[self.loss_type](pred, target)
        return loss.mean() if mean else loss

    def p_losses(
        self, x_start: torch.Tensor, cond: Conditioning, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the training loss at timesteps t, and the values to log.

        The loss is the simple loss (equation 14), weighted by `min_snr_gamma` and by a learned or fixed variance for
        each timestep, plus `original_elbo_weight` times the variational bound.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        alpha = extract_into_tensor(self.alphas_cumprod, t, x_start.shape)
        target = training_target(self.parameterization, x_start, noise, alpha)
        loss_simple = self.get_loss(output, target, mean=False).mean(dim=(1, 2, 3))
        prefix = "train" if self.training else "val"
        log = {f"{prefix}/loss_simple": loss_simple.mean()}
        logvar = self.logvar[t]
        loss = self.loss_weights[t] * loss_simple / logvar.exp() + logvar
        if self.learn_logvar:
            log[f"{prefix}/loss_gamma"] = loss.mean()
            log["logvar"] = self.logvar.data.mean()
        loss_vlb = (self.lvlb_weights[t] * loss_simple).mean()
        log[f"{prefix}/loss_vlb"] = loss_vlb
        loss = self.l_simple_weight * loss.mean() + self.original_elbo_weight * loss_vlb
        log[f"{prefix}/loss"] = loss
        return loss, log

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """Return the network's prediction for x_noisy (B, C, H, W) at timesteps t."""
        return self.model(x_noisy, t, **as_dict(cond, self.model.conditioning_key))

    def get_input(self, batch: Mapping[str, Any], k: str) -> torch.Tensor:
        """Return entry `k` of a batch, (B, H, W, C) or (B, H, W), as float (B, C, H, W)."""
        return batch_images(batch, k).to(self.device)

    def get_x_start(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the clean x_0 (B, C, h, w) of a batch, without its conditioning."""
        return self.get_input(batch, self.first_stage_key)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch at random timesteps, and the values to log."""
        return self(self.get_input(batch, self.first_stage_key))

    def forward(self, x: torch.Tensor, c: Conditioning = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of x at random timesteps, and the values to log."""
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, c, t)

    def before_training_batch(self, batch: Mapping[str, Any], is_first: bool) -> None:
        """Prepare for a batch; the trainer calls it before every batch, with `is_first` on the first of a new run."""

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
        """Sample `shape` (B, C, H, W) ancestrally, over all timesteps or the first `timesteps` of them.

        Options are fields of `SamplingOptions`. Returns the samples, and with `return_intermediates` the list of
        intermediate x_t.
        """
        sample, intermediates = self._sample_ancestral(cond, shape, x_T, timesteps, start_T, options)
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
        """Sample ancestrally; return the samples and the list of intermediate estimates of x_0.

        `shape` is (C, H, W) with `batch_size`, and (B, C, H, W) without it.
        """
        shape = (batch_size, *shape) if batch_size is not None else tuple(shape)
        sample, intermediates = self._sample_ancestral(cond, shape, x_T, None, start_T, options)
        return sample, intermediates["pred_x0"][1:]

    def _sample_ancestral(
        self,
        cond: Conditioning,
        shape: Sequence[int],
        x_T: torch.Tensor | None,
        timesteps: int | None,
        start_T: int | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
        steps = min(default(timesteps, self.num_timesteps), default(start_T, self.num_timesteps))
        sampling_options = SamplingOptions(**{"log_every_t": self.log_every_t, **options})
        return AncestralSampler(self, self.clip_denoised).run(shape, np.arange(steps), cond, sampling_options, x_T)

    def sample(
        self,
        cond: Conditioning = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        shape: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Sample (batch_size, C, H, W) ancestrally for the first `batch_size` items of the conditioning."""
        shape = default(shape, (batch_size, self.channels, self.image_size, self.image_size))
        return self.p_sample_loop(slice_batch(cond, batch_size), shape, return_intermediates, **options)

    def sample_log(
        self, cond: Conditioning, batch_size: int, ddim: bool, ddim_steps: int, **options: Any
    ) -> tuple[torch.Tensor, Any]:
        """Sample with DDIM or ancestrally; return the samples and the intermediates, for previews."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **options)
        shape = (self.channels, self.image_size, self.image_size)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, slice_batch(cond, batch_size), **options)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, torch.Tensor]:
        """Return images in [-1, 1] that show the model's results for a batch; see `preview`."""
        return preview.pixel_previews(self, batch, N, **options)


class LatentDiffusion(LatentSpace, ConditioningStage, DDPM):
    """Diffusion model of the latents of a first stage, optionally conditional (arXiv:2112.10752).

    Args:
        first_stage_config: target and parameters of the autoencoder, which is frozen.
        cond_stage_config: target and parameters of the encoder of the conditioning, or `__is_first_stage__`, or
            `__is_unconditional__`.
        num_timesteps_cond: more than 1 noises the conditioning too, over this number of timesteps.
        cond_stage_key: entry of a batch that holds the conditioning.
        cond_stage_trainable: train the encoder together with the denoising network.
        concat_mode: without a `conditioning_key`, concatenate the conditioning with the input; if False, attend to it.
        cond_stage_forward: name of the encoder's method to call instead of `encode`.
        conditioning_key: see `DiffusionWrapper`.
        scale_factor: factor of the latents.
        scale_by_std: make `scale_factor` a buffer and set it to one over the standard deviation of the latents of the
            first training batch.
        cond_dropout: probability of replacing the conditioning of a training item by the empty one: "" for text, the
            last class for labels, zeros otherwise. Classifier-free guidance needs it (arXiv:2207.12598).
        class_names: names of the classes in order, or a string that names their source: "imagenet", or the path of a
            file of names. It is stored as given; the model does not read the file.
        ckpt_path, ignore_keys, load_only_unet: see `DDPM`.
        **kwargs: parameters of `DDPM`.

    Example:
        A class-conditional model without a first stage. The last of its classes is the empty conditioning:

        >>> unet = {"in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "num_heads": 2}
        >>> unet |= {"image_size": 8, "attention_resolutions": [2], "channel_mult": [1, 1]}
        >>> unet |= {"use_spatial_transformer": True, "context_dim": 16}
        >>> classes = {"embed_dim": 16, "n_classes": 11, "key": "class_label"}
        >>> model = LatentDiffusion(
        ...     first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        ...     cond_stage_config={"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": classes},
        ...     cond_stage_key="class_label",
        ...     conditioning_key="crossattn",
        ...     unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        ...     image_size=8,
        ... )
        >>> loss, log = model.shared_step({"image": torch.zeros(2, 8, 8, 3), "class_label": torch.tensor([3, 7])})
        >>> loss.backward()
        >>> c, uc = (model.get_learned_conditioning({"class_label": torch.tensor([k, k])}) for k in (3, 10))
        >>> guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc}
        >>> with model.ema_scope():
        ...     latents, _ = DDIMSampler(model).sample(5, 2, (3, 8, 8), c, verbose=False, **guidance)
        >>> model.decode_first_stage(latents).shape
        torch.Size([2, 3, 8, 8])
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
        class_names: Sequence[str] | str = (),
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
        self.class_names = class_names
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
        self.register_cond_schedule(default(num_timesteps_cond, 1))
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self.cond_stage_model = self.build_cond_stage(cond_stage_config)
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def apply_model(self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None) -> torch.Tensor:
        """Return the network's prediction for x_noisy (B, C, H, W) at timesteps t.

        With `split_input_params` the prediction is made in tiles. Conditioning that is concatenated with the input
        is cut into the same tiles. All tiles share the rest.
        """
        if not self.split_input_params:
            return super().apply_model(x_noisy, t, cond)
        cond = as_dict(cond, self.model.conditioning_key)
        return tiled_predict(self.model, x_noisy, t, cond, self.split_input_params)

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
        """Return the scaled latents and the conditioning of a batch.

        For other keys than `first_stage_key`, return the entry itself as (B, C, H, W).


        Args:
            batch: images or their moments, and the conditioning or its encoding.
            k: entry of the batch.
            return_first_stage_outputs: append the images and their reconstructions.
            force_c_encode: encode the conditioning even if its encoder is trained.
            cond_key: entry of the conditioning, by default `cond_stage_key`.
            return_original_cond: append the conditioning before it is encoded.
            bs: use the first `bs` items of the batch.
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
        """Return the scaled latents (B, c, h, w) of a batch, without its conditioning."""
        return self.get_first_stage_encoding(self._encoded_batch(batch, self.first_stage_key, None)[1]).float()

    def _encoded_batch(self, batch: Mapping[str, Any], k: str, bs: int | None) -> tuple[torch.Tensor | None, Any]:
        """Return the images and their encoding; the images are None if the batch holds moments instead."""
        if LATENT_KEY in batch:
            return None, DiagonalGaussianDistribution(batch[LATENT_KEY][:bs].to(self.device, torch.float32))
        x = super().get_input(batch, k)[:bs]
        return x, self.encode_first_stage(x.to(next(self.first_stage_model.parameters(), x).dtype))

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch at random timesteps, and the values to log."""
        z, c = self.get_input(batch, self.first_stage_key)
        return self(z, c)

    def forward(self, x: torch.Tensor, c: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of latents (B, c, h, w) at random timesteps, and the values to log.

        A trainable conditioning stage encodes `c` here, with gradients.
        """
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
        """Return the parameters of the denoising network and, if it is trained, of the conditioning stage."""
        conditioning = list(self.cond_stage_model.parameters()) if self.cond_stage_trainable else []
        return [*super().optimizer_parameters(), *conditioning]

    @torch.no_grad()
    def before_training_batch(self, batch: Mapping[str, Any], is_first: bool) -> None:
        """Set the scale of the latents on the first batch of a new run, if `scale_by_std` is set."""
        if not (self.scale_by_std and is_first and not self.restarted_from_ckpt):
            return
        if self.scale_factor != 1.0:
            raise UserError("scale_by_std measures the scale of the latents; leave scale_factor at 1.0")
        z = self.get_input(batch, self.first_stage_key)[0]
        self.scale_factor.copy_(1.0 / z.flatten().std())

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, torch.Tensor]:
        """Return images in [-1, 1] that show the model's results for a batch; see `preview`."""
        return preview.latent_previews(self, batch, N, **options)


class Layout2ImgDiffusion(LatentDiffusion):
    """Latent diffusion model conditional on layouts of labelled boxes (arXiv:2112.10752, section 4.3.1).

    Args:
        cond_stage_key: must be "coordinates_bbox", the entry of a batch that holds the tokens of the layouts.
        **kwargs: parameters of `LatentDiffusion`.

    Raises:
        UserError: another `cond_stage_key`, or a conditioning stage that does not read tokens.
    """

    def __init__(self, cond_stage_key: str = LAYOUT_KEY, **kwargs: Any) -> None:
        if cond_stage_key != LAYOUT_KEY:
            raise UserError(f'Layout2ImgDiffusion needs the cond_stage_key "{LAYOUT_KEY}", not "{cond_stage_key}"')
        super().__init__(cond_stage_key=cond_stage_key, **kwargs)
        transformer = getattr(self.cond_stage_model, "transformer", None)
        if transformer is None or getattr(self.cond_stage_model, "use_tknz_fn", False):
            raise UserError("Layout2ImgDiffusion needs a cond_stage_config that reads tokens: use_tokenizer: false")
        self.layout_tokens = LayoutTokens(transformer.num_tokens)

    def class_name(self, label: int) -> str:
        """Return the name of class `label`, or its number where `class_names` does not list it."""
        names = () if isinstance(self.class_names, str) else self.class_names
        return names[label] if label < len(names) else str(label)

    def empty_conditioning(self, xc: torch.Tensor) -> torch.Tensor:
        """Return layouts of the shape of `xc` without boxes."""
        return torch.full_like(xc, self.layout_tokens.none)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, **options: Any) -> dict[str, torch.Tensor]:
        """Return images in [-1, 1] that show the model's results for a batch; see `preview`."""
        return preview.layout_previews(self, batch, N, **options)


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f'{name} "{value}" is not known{did_you_mean(value, known)}; choose one of {", ".join(known)}')
