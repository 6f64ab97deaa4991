"""First stages: autoencoders between images and the latents of diffusion models (arXiv:2112.10752, section 3.1).

Shapes: image (B, C, H, W) in [-1, 1]; latent (B, embed_dim, h, w), with h = H / 2^(levels - 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
from ldm.io.checkpoint.loading import EMA_PREFIX, LoadReport, load_weights, part_of
from ldm.io.checkpoint.reading import read_state_dict
from ldm.io.pixels import batch_images, in_random_colours
from ldm.models.shapes import check_channels, check_sides
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import EmaMixin, LitEma
from ldm.modules.losses.adversarial import AdversarialLoss
from ldm.modules.losses.contperceptual import DummyLoss
from ldm.modules.quantize import VectorQuantizer2 as VectorQuantizer


@dataclass(frozen=True)
class Reconstruction:
    """Result of one forward pass of an autoencoder, shared by the losses of autoencoder and discriminator.

    Attributes:
        inputs: images (B, C, H, W).
        outputs: reconstructions of the images.
        regularizer: the posterior (KL) or the codebook loss (VQ).
        extra: further arguments of the loss.
    """

    inputs: Tensor
    outputs: Tensor
    regularizer: DiagonalGaussianDistribution | Tensor
    extra: dict[str, Any]


class Autoencoder(nn.Module):
    """Base class of the first stages: encoder, decoder and loss.

    Args:
        ddconfig: parameters of `Encoder` and `Decoder`.
        lossconfig: target and parameters of the loss; `torch.nn.Identity` for a model that is not trained.
        image_key: entry of a batch that holds the images.
        colorize_nlabels: number of channels of segmentation maps, to show them in colours.
        monitor: name of the logged value that selects the checkpoints to keep.

    Raises:
        UserError: `ddconfig` has a key that is not a parameter of `Encoder` or `Decoder`.
    """

    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    # Base learning rate of the published first stages; a trainer may set another.
    learning_rate: float = 4.5e-6
    # Factor of the learning rate of the autoencoder; the discriminator does not use it.
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
        for fault in ddconfig_faults(ddconfig):
            raise UserError(fault)
        self.encoder = Encoder(**ddconfig)
        self.in_channels = self.encoder.conv_in.in_channels
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.decoder.conv_out.weight.device

    def init_from_ckpt(self, path: str | Path, ignore_keys: Iterable[str] = ()) -> None:
        """Load weights from a checkpoint.

        Args:
            path: checkpoint of a first stage, or of a diffusion model that contains it; searched in the current
                folder, then in the repository.
            ignore_keys: prefixes of the names to skip.

        Raises:
            UserError: the file is missing, damaged, or holds another model.
        """
        self._load(path, ignore_keys)

    def _load(self, path: str | Path, ignore_keys: Iterable[str]) -> LoadReport:
        path = locate(path)
        weights = part_of(read_state_dict(path), "first_stage_model.")
        return load_weights(self, weights, ignore_keys, source=f'"{path}"')

    def decode(self, z: Tensor) -> Tensor:
        """Decode a latent to an image."""
        return self.decoder(self.post_quant_conv(z))

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the images `batch[k]`, (B, H, W, C) or (B, H, W), as (B, C, H, W)."""
        return batch_images(batch, k)

    def get_last_layer(self) -> Tensor:
        """Return the weight of the last layer, whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def to_rgb(self, x: Tensor) -> Tensor:
        """Convert segmentation maps (B, K, H, W) to images (B, 3, H, W) in [-1, 1], in random but fixed colours."""
        return in_random_colours(x, getattr(self, "colorize", None))

    def _as_rgb(self, x: Tensor) -> Tensor:
        return self.to_rgb(x) if x.shape[1] > 3 else x

    def check_channels(self, x: Tensor) -> None:
        """Raise UserError if images (B, C, H, W) have another number of channels than the encoder takes."""
        check_channels(x, self.in_channels, "the first stage", "ddconfig.in_channels")

    def training_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the images of `get_input` if the model can reconstruct them in their size.

        Raises:
            UserError: the model takes other channels, or cannot halve the sides at each of its levels.
        """
        x = self.get_input(batch, k)
        self.check_channels(x)
        check_sides(x, 2 ** (len(self.encoder.down) - 1), "the first stage")
        return x

    def adversarial_loss(
        self, rec: Reconstruction, optimizer_idx: int, global_step: int, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the autoencoder (`optimizer_idx` 0) or of the discriminator (1), and the values to log.

        Raises:
            UserError: the model has no loss, or one for other images.
        """
        if isinstance(self.loss, nn.Identity | DummyLoss):
            raise UserError(
                f"this {type(self).__name__} has the loss {type(self.loss).__name__} and cannot be trained; "
                'give "lossconfig" a training loss such as ldm.modules.losses.LPIPSWithDiscriminator'
            )
        if isinstance(self.loss, AdversarialLoss):
            self.loss.check_images(rec.inputs, rec.outputs)
        return self._loss(rec, optimizer_idx=optimizer_idx, global_step=global_step, split=split)

    def _loss(self, rec: Reconstruction, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def _generator_modules(self) -> list[nn.Module]:
        return [self.encoder, self.decoder, self.quant_conv, self.post_quant_conv]

    def optimizer_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the autoencoder, and those of its discriminator if it has one."""
        generator = [p for module in self._generator_modules() for p in module.parameters() if p.requires_grad]
        discriminator = getattr(self.loss, "discriminator", None)
        return generator, list(discriminator.parameters()) if discriminator is not None else []


def ddconfig_faults(ddconfig: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that are parameters of neither `Encoder` nor `Decoder`; each ignores those of the other."""
    known = {*signature(Encoder).parameters, *signature(Decoder).parameters}
    for key in ddconfig:
        if key not in known:
            yield f'ddconfig has an unknown key "{key}"{did_you_mean(str(key), known)}'


class VQModel(EmaMixin, Autoencoder):
    """Autoencoder with a codebook (VQ-reg.; VQGAN, arXiv:2012.09841).

    Args:
        ddconfig, lossconfig, image_key, colorize_nlabels, monitor: see `Autoencoder`.
        n_embed: number of entries of the codebook.
        embed_dim: length of an entry, the number of channels of the latent.
        ckpt_path, ignore_keys: weights to start from; see `init_from_ckpt`.
        batch_resize_range: (smallest, largest) size to which each batch is resized at random, in steps of 16.
        scheduler_config: learning rate schedule, for the trainer.
        lr_g_factor: factor of the learning rate of the autoencoder.
        remap, sane_index_shape: see `VectorQuantizer2`.
        use_ema: keep a moving average of the weights.
    """

    quantize: Any  # a quantizer; subclasses choose another class

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
        """Load weights from a checkpoint; a missing moving average is set to the weights."""
        report = self._load(path, ignore_keys)
        if any(name.startswith(EMA_PREFIX) for name in report.missing):
            self.restart_ema()

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode an image to the latent before quantization."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Encode an image to (quantized latent, codebook loss, (None, None, indices))."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Decode a quantized latent to an image."""
        return super().decode(quant)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Decode codebook indices (B, h, w) to an image.

        Raises:
            ValueError: the indices have another shape.
        """
        if code_b.dim() != 3:
            raise ValueError(f"indices need the shape (B, h, w), got {tuple(code_b.shape)}")
        quant = self.quantize.get_codebook_entry(code_b, shape=(*code_b.shape, self.embed_dim))
        return self._decode_quantized(quant)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Any, Any, Tensor]]:
        """Return the result of the quantizer for an image."""
        return self.encode(x)

    def _decode_quantized(self, quant: Tensor) -> Tensor:
        """Decode a latent that is quantized already."""
        return self.decode(quant)

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Return the reconstruction of an image, the codebook loss, and with `return_pred_indices` the indices."""
        quant, codebook_loss, (_, _, indices) = self._quantized(input)
        reconstruction = self._decode_quantized(quant)
        if return_pred_indices:
            return reconstruction, codebook_loss, indices
        return reconstruction, codebook_loss

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Return the images (B, H, W, C) of a batch as (B, C, H, W), resized if `batch_resize_range` is set."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None:
            return x
        smallest, largest = self.batch_resize_range
        # The first batches have the largest size, so that a lack of memory shows at once.
        use_largest = self._resized_batches < 5
        self._resized_batches += 1
        size = largest if use_largest else int(np.random.choice(np.arange(smallest, largest + 16, 16)))
        return x if size == x.shape[2] else F.interpolate(x, size=size, mode="bicubic")

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstruction:
        """Run the model on a batch, for `adversarial_loss`."""
        x = self.training_input(batch, self.image_key)
        outputs, codebook_loss, indices = self(x, return_pred_indices=True)
        return Reconstruction(x, outputs, codebook_loss, {"predicted_indices": indices})

    def _loss(self, rec: Reconstruction, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(
            rec.regularizer, rec.inputs, rec.outputs, last_layer=self.get_last_layer(), **options, **rec.extra
        )

    def _generator_modules(self) -> list[nn.Module]:
        return [self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, plot_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the images of a batch and their reconstructions, with `plot_ema` also with the averaged weights."""
        x = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return {"inputs": x}
        log = {"inputs": self._as_rgb(x), "reconstructions": self._as_rgb(self(x)[0])}
        if plot_ema:
            with self.ema_scope():
                log["reconstructions_ema"] = self._as_rgb(self(x)[0])
        return log


class VQModelInterface(VQModel):
    """`VQModel` for diffusion models, which work on the latent before quantization."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "embed_dim": embed_dim})

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override] # as published, only the latent
        """Encode an image to the latent before quantization."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Decode a latent to an image, after quantization unless `force_not_quantize` is set."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Any, Any, Tensor]]:
        return self.quantize(self.encode(x))

    def _decode_quantized(self, quant: Tensor) -> Tensor:
        return self.decode(quant, force_not_quantize=True)


class AutoencoderKL(Autoencoder):
    """Autoencoder with a Gaussian latent, regularized towards the standard normal distribution (VAE, arXiv:1312.6114).

    Args:
        ddconfig, lossconfig, image_key, colorize_nlabels, monitor: see `Autoencoder`.
        embed_dim: number of channels of the latent.
        ckpt_path, ignore_keys: weights to start from; see `init_from_ckpt`.
        scheduler_config: learning rate schedule of both optimizers, for the trainer.
        freeze_encoder: train only the decoder. The latents do not change, so diffusion models of them stay valid.

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
        """Encode an image to the posterior of its latent."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Return the reconstruction from a sample, or from the mode, of the posterior, and the posterior."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def reconstruct(self, batch: Mapping[str, Any]) -> Reconstruction:
        """Run the model on a batch, for `adversarial_loss`."""
        x = self.training_input(batch, self.image_key)
        outputs, posterior = self(x)
        return Reconstruction(x, outputs, posterior, extra={})

    def _loss(self, rec: Reconstruction, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(rec.inputs, rec.outputs, rec.regularizer, last_layer=self.get_last_layer(), **options)

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], only_inputs: bool = False, **kwargs: Any) -> dict[str, Tensor]:
        """Return the images of a batch, their reconstructions, and decoded samples of standard normal latents."""
        x = self.get_input(batch, self.image_key).to(self.device)
        if only_inputs:
            return {"inputs": x}
        reconstructions, posterior = self(x)
        samples = self.decode(torch.randn_like(posterior.sample()))
        return {
            "samples": self._as_rgb(samples),
            "reconstructions": self._as_rgb(reconstructions),
            "inputs": self._as_rgb(x),
        }


class IdentityFirstStage(nn.Module):
    """First stage that returns its input, for diffusion models of images.

    Args:
        vq_interface: make `quantize` return the tuple of a quantizer.
        *args, **kwargs: ignored, so that the configuration of any first stage is accepted.
    """

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x."""
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x."""
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return x, with `vq_interface` as (x, no loss, no indices)."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return x."""
        return x
