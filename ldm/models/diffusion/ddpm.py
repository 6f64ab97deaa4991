"""Diffusion models: the denoising network, its conditioning and its loss.

The models are plain modules. `DiffusionProcess` implements their noise schedule, `LatentSpace` their first stage and
`ConditioningStage` the encoder of their conditioning. `ldm.training.modules` trains them.

Shapes: images x (B, C, H, W) in [-1, 1]; latents z (B, c, h, w); timesteps t (B,) int64 from 0 to T - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ldm.compat import published_names
from ldm.errors import UserError, did_you_mean
from ldm.io.batch_items import item_names
from ldm.io.checkpoint.loading import EMA_PREFIX, load_weights
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.pixels import batch_images
from ldm.models.diffusion import preview
from ldm.models.diffusion.adaptation import Adaptation
from ldm.models.diffusion.batch_keys import CONDITIONING_KEY, LATENT_KEY, LAYOUT_KEY
from ldm.models.diffusion.conditioning import CONCAT_KEYS, Conditioning, DiffusionWrapper, as_dict
from ldm.models.diffusion.conditioning_stage import ConditioningStage
from ldm.models.diffusion.latent_space import LatentSpace, deviation, measured_batches
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.sampling_methods import LatentSampling, PixelSampling
from ldm.models.diffusion.tiling import tiled_predict
from ldm.models.diffusion.training_hooks import TrainingHooks
from ldm.models.shapes import check_network_input
from ldm.modules.diffusionmodules.parameterization import PARAMETERIZATIONS, training_target
from ldm.modules.diffusionmodules.schedule import GRIDS, extract_into_tensor
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import EmaMixin, LitEma
from ldm.modules.encoders.layout import LayoutTokens
from ldm.util import default

__getattr__ = published_names(__name__)

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda prediction, target: (prediction - target).abs(),
    "l2": lambda prediction, target: (prediction - target) ** 2,
}


class DDPM(TrainingHooks, PixelSampling, EmaMixin, DiffusionProcess):
    """Diffusion model of images (arXiv:2006.11239).

    The parameters are those of the published configurations, plus `min_snr_gamma`, `rescale_betas_zero_snr` and
    `timestep_spacing`. The `base_learning_rate` of a YAML configuration is not a parameter: the trainer derives
    `learning_rate` from it.

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
        rescale_betas_zero_snr: rescale the betas so that the last timestep is noise alone (zero terminal SNR,
            arXiv:2305.08891). The parameterization must be "v" or "x0". The tables of a checkpoint are not used.
        timestep_spacing: default grid of the samplers, see `schedule.make_ddim_timesteps`; None for their own.

    Raises:
        UserError: an unknown schedule, grid, parameterization, loss or conditioning key; γ is not above 0; betas out of
            range; or the parameterization is "eps", and ᾱ is 0 at a timestep.
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
        rescale_betas_zero_snr: bool = False,
        timestep_spacing: str | None = None,
    ) -> None:
        super().__init__()
        _check_known("parameterization", parameterization, PARAMETERIZATIONS)
        if timestep_spacing is not None:
            _check_known("timestep_spacing", timestep_spacing, GRIDS)
        _check_known("loss_type", loss_type, tuple(LOSSES))
        self.parameterization = parameterization
        self.timestep_spacing = timestep_spacing
        self.v_posterior, self.min_snr_gamma = v_posterior, min_snr_gamma
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        self.cond_stage_model: Any = None
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
        self.register_schedule(
            given_betas=given_betas,
            beta_schedule=beta_schedule,
            timesteps=timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            cosine_s=cosine_s,
        )
        if not hasattr(self, "loss_weights"):  # a subclass registered the published tables
            self.register_table("loss_weights", np.ones(self.num_timesteps), persistent=False)
        self._init_logvar(learn_logvar, logvar_init)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

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
        own = self.state_dict()
        weights = self.adapt_weights(read_state_dict(path))
        weights = {n: value for n, value in weights.items() if n in own or not n.startswith(EMA_PREFIX)}
        if only_model:
            weights = {name[6:]: value for name, value in weights.items() if name.startswith("model.")} or weights
        ignored = (*ignore_keys, *self.additions_missing_in(weights, "model." if only_model else ""))
        report = load_weights(self.model if only_model else self, weights, ignored, source=f'"{path}"')
        if only_model or any(name.startswith(EMA_PREFIX) for name in report.missing):
            self.restart_ema()

    def adapt_weights(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights of a file in the shapes of this model; extensions of other models override it."""
        return weights

    def additions_missing_in(self, names: Iterable[str], prefix: str = "") -> list[str]:
        """Return the prefixes of parts of this model that a file may lack."""
        return []

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer trains."""
        return [*self.model.parameters(), *([self.logvar] if isinstance(self.logvar, nn.Parameter) else [])]

    # -- loss ------------------------------------------------------------------------------------------------

    def get_loss(self, pred: torch.Tensor, target: torch.Tensor, mean: bool = True) -> torch.Tensor:
        """Return the `loss_type` distance: its mean, or with `mean=False` its elements."""
        loss = LOSSES[self.loss_type](pred, target)
        return loss.mean() if mean else loss

    def p_losses(
        self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the training loss at timesteps t, and the values to log."""
        return self._losses(x_start, None, t, noise)

    def _losses(
        self, x_start: torch.Tensor, cond: Conditioning, t: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the training loss at timesteps t, and the values to log.

        The loss is the simple loss (equation 14), weighted by `min_snr_gamma` and by a learned or fixed variance for
        each timestep, plus `original_elbo_weight` times the variational bound.
        """
        if not getattr(self, "split_input_params", None):  # the network gets tiles then
            key = self.model.conditioning_key  # other models may use this entry for something else
            concat = as_dict(cond, key).get("c_concat", []) if key in CONCAT_KEYS else []
            check_network_input(self.model.diffusion_model, x_start, concat, getattr(self, "downsampling", 1))
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

    def apply_model(
        self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None, return_ids: bool = False
    ) -> Any:
        """Return the network's prediction for x_noisy (B, C, H, W) at timesteps t.

        Of a network that returns a tuple, this is its first element, or with `return_ids` the tuple.
        """
        output = self.model(x_noisy, t, **as_dict(cond, self.model.conditioning_key))
        return output[0] if isinstance(output, tuple) and not return_ids else output

    def get_input(self, batch: Mapping[str, Any], k: str) -> torch.Tensor:
        """Return entry `k` of a batch, (B, H, W, C) or (B, H, W), as float (B, C, H, W)."""
        return batch_images(batch, k).to(self.device)

    def get_x_start(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the clean x_0 (B, C, h, w) of a batch, without its conditioning."""
        return self.get_input(batch, self.first_stage_key)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch at random timesteps, and the values to log."""
        return self(self.get_input(batch, self.first_stage_key))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of x at random timesteps, and the values to log; other arguments go to `p_losses`."""
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, t, *args, **kwargs)

    def before_training_batch(self, batch: Mapping[str, Any], is_first: bool) -> None:
        """Prepare for a batch; the trainer calls it before every batch, with `is_first` on the first of a new run."""

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        """Return images in [-1, 1] that show the model's results for a batch; see `preview.pixel_previews`."""
        return preview.pixel_previews(self, batch, N, *args, **options)


class LatentDiffusion(  # type: ignore[misc] # the published methods of both mixins for sampling differ
    LatentSampling, LatentSpace, ConditioningStage, Adaptation, DDPM
):
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
            first training batch. With `{batches: N}`, `ldm train` measures the first N batches instead.
        cond_dropout: probability of replacing the conditioning of a training item by the empty one: "" for text, the
            last class for labels, zeros otherwise. Classifier-free guidance needs it (arXiv:2207.12598).
        class_names: names of the classes in order, or a string that names their source: "imagenet", or the path of a
            file of names. It is stored as given; only previews of layouts read the file.
        palette: path of the file with the colours of label maps, for colour images; see `ldm.io.label_maps`. The model
            does not read it.
        lora_config: target and parameters of low-rank updates, such as `LoRA`. They alone are trained and averaged.
        personalization_config: target and parameters of vectors of new words (textual inversion), such as
            `EmbeddingManager`. They alone are trained.
        embedding_manager_ckpt: file of such vectors to start from.
        embedding_reg_weight: accepted for published configurations, which leave it at 0.
        use_ema, ckpt_path, ignore_keys, load_only_unet: see `DDPM`.
        **kwargs: parameters of `DDPM`.

    Example:
        A class-conditional model without a first stage. The last of its classes is the empty conditioning:

        >>> from ldm.models.diffusion.ddim import DDIMSampler
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
        scale_by_std: bool | Mapping[str, Any] = False,
        cond_dropout: float = 0.0,
        class_names: Sequence[str] | str = (),
        palette: str | None = None,
        lora_config: Mapping[str, Any] | None = None,
        personalization_config: Mapping[str, Any] | None = None,
        embedding_manager_ckpt: str | None = None,
        embedding_reg_weight: float = 0.0,
        use_ema: bool = True,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        **kwargs: Any,
    ) -> None:
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        self.num_timesteps_cond = default(num_timesteps_cond, 1)  # for `register_schedule`
        additions = (lora_config, personalization_config)
        averages_all = use_ema and additions == (None, None)
        super().__init__(conditioning_key=conditioning_key, use_ema=averages_all, **kwargs)
        if not 0.0 <= cond_dropout < 1.0:
            raise UserError(f"cond_dropout must lie in [0, 1), got {cond_dropout}")
        if embedding_reg_weight:
            raise UserError("embedding_reg_weight is not implemented; leave it at 0")
        self.cond_dropout = cond_dropout
        self.class_names, self.palette = class_names, palette
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.clip_denoised = False  # latents have no fixed range
        self.scale_by_std, self.scale_batches = bool(scale_by_std), measured_batches(scale_by_std)
        if scale_by_std:
            self.register_table("scale_factor", scale_factor)
        else:
            self.scale_factor = scale_factor
        self.instantiate_first_stage(first_stage_config)
        self.num_downs = self.downsampling.bit_length() - 1
        self.bbox_tokenizer = None
        self.instantiate_cond_stage(cond_stage_config)
        self.adapt(*additions, use_ema)
        self.restarted_from_ckpt = ckpt_path is not None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        self.initialise_words(ckpt_path is not None, embedding_manager_ckpt)

    def apply_model(
        self, x_noisy: torch.Tensor, t: torch.Tensor, cond: Conditioning = None, return_ids: bool = False
    ) -> Any:
        """Return the network's prediction for x_noisy (B, C, H, W) at timesteps t.

        With `split_input_params` the prediction is made in tiles. Conditioning that is concatenated with the input
        is cut into the same tiles. All tiles share the rest.
        """
        split = getattr(self, "split_input_params", None)
        if not split:
            return super().apply_model(x_noisy, t, cond, return_ids)
        cond = as_dict(cond, self.model.conditioning_key)
        return tiled_predict(self.model, x_noisy, t, cond, split)

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
        if x is None and return_first_stage_outputs:  # the batch holds moments, and its images only for previews
            x = super().get_input(batch, k)[:bs] if k in batch else self.decode_first_stage(z)
        c: Any = None
        xc: Any = None
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

    def p_losses(  # type: ignore[override] # as published, with a conditioning
        self, x_start: torch.Tensor, cond: Conditioning, t: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the training loss of latents at timesteps t, and the values to log."""
        return self._losses(x_start, cond, t, noise)

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch at random timesteps, and the values to log; other arguments have no effect."""
        z, c = self.get_input(batch, self.first_stage_key)
        return self(z, c)

    def forward(
        self, x: torch.Tensor, c: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of latents (B, c, h, w) at random timesteps, and the values to log.

        A trainable conditioning stage encodes `c` here, with gradients. The other arguments go to `p_losses`.
        """
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        if self.model.conditioning_key is not None:
            if c is None:
                raise ValueError(f'conditioning_key "{self.model.conditioning_key}" needs a conditioning')
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self.q_sample(x_start=c, t=self.cond_ids[t], noise=torch.randn_like(c.float()))
        return self.p_losses(x, c, t, *args, **kwargs)

    def optimizer_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to train: of the network, and of a trainable conditioning stage; or of additions."""
        if self.adapted:
            return self.adapted_parameters()
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
        cast(torch.Tensor, self.scale_factor).copy_(1.0 / deviation(z, item_names(batch)))

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        """Return images in [-1, 1] that show the model's results for a batch; see `preview.latent_previews`."""
        return preview.latent_previews(self, batch, N, *args, **options)


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
        return preview.class_name(self.class_names, label)

    def empty_conditioning(self, xc: torch.Tensor) -> torch.Tensor:
        """Return layouts of the shape of `xc` without boxes."""
        return torch.full_like(xc, self.layout_tokens.none)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        """Return images in [-1, 1] that show the model's results for a batch; see `preview.layout_previews`."""
        return preview.layout_previews(self, batch, N, *args, **options)


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f'{name} "{value}" is not known{did_you_mean(value, known)}; choose one of {", ".join(known)}')
