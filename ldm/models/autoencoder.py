"""First stages: autoencoders between images and the latent that diffusion works in (section 3.1 of 2112.10752).

Shapes: image (B, C, H, W) in [-1, 1]; latent (B, embed_dim, h, w), with h = H / 2^(levels - 1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.assets import locate
from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError, did_you_mean
from ldm.io.checkpoint.loading import LoadReport, load_weights, part_of
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.pixels import batch_images, in_random_colours
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.quantize import VectorQuantizer2 as VectorQuantizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reconstruction:
    """One pass of a batch through an autoencoder, kept for both losses.

    Attributes:
        inputs: the images, (B, C, H, W).
        outputs: their reconstructions.
        regularizer: the posterior (KL) or the codebook loss (VQ).
        extra: arguments that the loss takes besides.
    """

    inputs: Tensor
    outputs: Tensor
    regularizer: DiagonalGaussianDistribution | Tensor
    extra: dict[str, Any]


class Autoencoder(nn.Module):
    """What the first stages share: encoder, decoder, loss, reading batches, and what a trainer asks for.

    Args:
        ddconfig: parameters of `Encoder` and `Decoder`.
        lossconfig: target and parameters of the loss; `torch.nn.Identity` for a model that is not trained.
        image_key: the entry of a batch that holds the images.
        colorize_nlabels: channels of a segmentation map, to show it in colours.
        monitor: name of the logged value that decides which checkpoints to keep.
    """

    # What a trainer may set; the base learning rate of every published first stage.
    learning_rate: float = 4.5e-6
    # Multiplies the learning rate of the generator, not that of the discriminator.
    lr_g_factor: float = 1.0
    scheduler_config: Mapping[str, Any] | None = None

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        self.image_key = image_key
        self.monitor = monitor
        _check_keys(ddconfig)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.conv_out.weight.device

    def init_from_ckpt(self, path: str | Path, ignore_keys: Iterable[str] = ()) -> None:
        """Load weights, except those whose names begin with one of `ignore_keys`.

        Args:
            path: a first stage's file, or that of a diffusion model whose first stage to take; looked for in the
                current folder, then in the repository.

        Raises:
            UserError: the file is missing, damaged, or holds another model.
        """
        self._load(path, ignore_keys)

    def _load(self, path: str | Path, ignore_keys: Iterable[str]) -> LoadReport:
        path = locate(path)
        weights = part_of(read_state_dict(path), "first_stage_model.")
        return load_weights(self, weights, ignore_keys, source=f'"{path}"')

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image."""
        return self.decoder(self.post_quant_conv(z))

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """The images `batch[k]`, (B, H, W, C) or (B, H, W), as (B, C, H, W)."""
        return batch_images(batch, k)

    def get_last_layer(self) -> Tensor:
        """The weight that makes the image, at which the adversarial term is weighed."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def to_rgb(self, x: Tensor) -> Tensor:
        """A segmentation map (B, labels, H, W) in random but fixed colours: (B, 3, H, W) in [-1, 1]."""
        return in_random_colours(x, getattr(self, "colorize", None))

    def _shown(self, x: Tensor) -> Tensor:
        return self.to_rgb(x) if x.shape[1] > 3 else x

    def adversarial_loss(
        self, rec: Reconstruction, optimizer_idx: int, global_step: int, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the autoencoder (`optimizer_idx` 0) or of the discriminator (1), and what to log.

        Raises:
            UserError: the model was built without a loss.
        """
        if isinstance(self.loss, nn.Identity | DummyLoss):
            raise UserError(
                f"this {type(self).__name__} has the loss {type(self.loss).__name__} and cannot be trained; "
                'give "lossconfig" a training loss such as ldm.modules.losses.LPIPSWithDiscriminator'
            )
        return self._loss(rec, optimizer_idx=optimizer_idx, global_step=global_step, split=split)

    def _loss(self, rec: Reconstruction, **where: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def _generator_modules(self) -> list[nn.Module]:
        return [self.encoder, self.decoder, self.quant_conv, self.post_quant_conv]

    def optimizer_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters of the autoencoder, and those of its discriminator (none without one)."""
        generator = [p for module in self._generator_modules() for p in module.parameters() if p.requires_grad]
        discriminator = getattr(self.loss, "discriminator", None)
        return generator, list(discriminator.parameters()) if discriminator is not None else []


def _check_keys(ddconfig: Mapping[str, Any]) -> None:
    """Refuse keys that neither network knows; each ignores those of the other."""
    known = {*signature(Encoder).parameters, *signature(Decoder).parameters}
    for key in ddconfig:
        if key not in known:
            raise UserError(f'ddconfig has an unknown key "{key}"{did_you_mean(str(key), known)}')


class VQModel(Autoencoder):
    """Autoencoder with a codebook (VQ-reg.; VQGAN, arXiv 2012.09841).

    Args beyond those of `Autoencoder`:
        n_embed: entries of the codebook.
        embed_dim: length of an entry, the channels of the latent.
        ckpt_path, ignore_keys: weights to start from; see `init_from_ckpt`.
        batch_resize_range: (smallest, largest) size that each batch is randomly resized to, in steps of 16.
        scheduler_config: learning-rate schedule, for the trainer.
        lr_g_factor: multiplies the learning rate of the autoencoder.
        remap, sane_index_shape: see `VectorQuantizer2`.
        use_ema: keep a moving average of the weights.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | Path | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: tuple[int, int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | Path | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ) -> None:
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor)
        self.embed_dim = embed_dim
        self.n_embed = n_embed
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        self.batch_resize_range = batch_resize_range
        self._resized_batches = 0
        self.scheduler_config = scheduler_config
        self.lr_g_factor = lr_g_factor
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_from_ckpt(self, path: str | Path, ignore_keys: Iterable[str] = ()) -> None:
        """As for every first stage; averages that the file lacks start at its weights."""
        report = self._load(path, ignore_keys)
        if self.use_ema and any(name.startswith("model_ema.") for name in report.missing):
            self.model_ema.restart(self)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run with the averaged weights, where there are any; `context` names the occasion in the log."""
        if not self.use_ema:
            yield
            return
        if context is not None:
            logger.info("%s: using the averaged weights", context)
        with self.model_ema.swapped(self):
            yield

    def update_ema(self) -> None:
        """Take the present weights into the average; to be called after every optimizer step."""
        if self.use_ema:
            self.model_ema(self)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Image -> latent before quantization."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Image -> quantized latent, codebook loss, (None, None, indices)."""
        return self.quantize(self.encode_to_prequant(x))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Codebook indices (B, h, w) -> image."""
        if code_b.dim() != 3:
            raise ValueError(f"indices need the shape (B, h, w), got {tuple(code_b.shape)}")
        quant = self.quantize.get_codebook_entry(code_b, shape=(*code_b.shape, self.embed_dim))
        return Autoencoder.decode(self, quant)

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Image -> reconstruction, codebook loss, and on request codebook indices."""
        quant, codebook_loss, (_, _, indices) = self.quantize(self.encode_to_prequant(input))
        # The latent is quantized already, also in the interface, whose own `decode` quantizes.
        reconstruction = Autoencoder.decode(self, quant)
        if return_pred_indices:
            return reconstruction, codebook_loss, indices
        return reconstruction, codebook_loss

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """The images of a batch, (B, H, W, C), as (B, C, H, W), resized where `batch_resize_range` is given."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None:
            return x
        smallest, largest = self.batch_resize_range
        # The first batches have the largest size: should memory not suffice, that shows at once.
        first = self._resized_batches < 5
        self._resized_batches += 1
        size = largest if first else int(np.random.choice(np.arange(smallest, largest + 16, 16)))
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic")

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstruction:
        """Pass a batch through the model, for `adversarial_loss`."""
        x = self.get_input(batch, self.image_key)
        outputs, codebook_loss, indices = self(x, return_pred_indices=True)
        return Reconstruction(x, outputs, codebook_loss, {"predicted_indices": indices})

    def _loss(self, rec: Reconstruction, **where: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(
            rec.regularizer, rec.inputs, rec.outputs, last_layer=self.get_last_layer(), **where, **rec.extra
        )

    def _generator_modules(self) -> list[nn.Module]:
        return [self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, plot_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The images of a batch and their reconstructions, with `plot_ema` also under the averaged weights."""
        x = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return {"inputs": x}
        log = {"inputs": self._shown(x), "reconstructions": self._shown(self(x)[0])}
        if plot_ema:
            with self.ema_scope():
                log["reconstructions_ema"] = self._shown(self(x)[0])
        return log


class VQModelInterface(VQModel):
    """`VQModel` as the first stage of a diffusion model, which works on the latent before quantization."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Image -> latent before quantization."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latent -> image; it is quantized first unless `force_not_quantize`."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


class AutoencoderKL(Autoencoder):
    """Autoencoder with a Gaussian latent kept near the standard normal distribution (KL-reg.; VAE, arXiv 1312.6114).

    Args beyond those of `Autoencoder`:
        embed_dim: channels of the latent.
        ckpt_path, ignore_keys: weights to start from; see `init_from_ckpt`.
        scheduler_config: learning-rate factors for both optimizers, as for `VQModel`.
        freeze_encoder: train what decodes only. Latents stay what they are, and so does every diffusion model of them.

    Raises:
        UserError: `ddconfig` has no `double_z: true`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | Path | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        freeze_encoder: bool = False,
    ) -> None:
        if not ddconfig.get("double_z"):
            raise UserError("AutoencoderKL needs ddconfig.double_z: true, for mean and variance of the latent")
        super().__init__(ddconfig, lossconfig, image_key, colorize_nlabels, monitor)
        self.embed_dim = embed_dim
        self.scheduler_config = scheduler_config
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], kernel_size=1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)
        if freeze_encoder:
            for module in (self.encoder, self.quant_conv):
                module.requires_grad_(False)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Image -> distribution of the latent."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Image -> reconstruction from a draw (or from the mean) of the posterior, and the posterior."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstruction:
        """Pass a batch through the model, for `adversarial_loss`."""
        x = self.get_input(batch, self.image_key)
        return Reconstruction(x, *self(x), extra={})

    def _loss(self, rec: Reconstruction, **where: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(rec.inputs, rec.outputs, rec.regularizer, last_layer=self.get_last_layer(), **where)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], only_inputs: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """The images of a batch, their reconstructions, and what the decoder makes of standard normal noise."""
        x = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return {"inputs": x}
        reconstructions, posterior = self(x)
        samples = self.decode(torch.randn_like(posterior.sample()))
        return {
            "samples": self._shown(samples),
            "reconstructions": self._shown(reconstructions),
            "inputs": self._shown(x),
        }


class IdentityFirstStage(nn.Module):
    """No first stage: diffusion works on the images themselves.

    Args:
        vq_interface: answer `quantize` as a quantizer does.
        *args, **kwargs: ignored, so that any first stage's configuration will do.
    """

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The image."""
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The image."""
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The image, with `vq_interface` followed by no loss and no indices."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The image."""
        return x
