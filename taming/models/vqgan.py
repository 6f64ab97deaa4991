from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ldm.config.instantiate import instantiate_from_config
from ldm.models import autoencoder
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import EMAVectorQuantizer, GumbelQuantize
from taming.modules.vqvae.quantize import VectorQuantizer2 as VectorQuantizer

__all__ = [
    "EMAVQ",
    "Decoder",
    "EMAVectorQuantizer",
    "Encoder",
    "GumbelQuantize",
    "GumbelVQ",
    "VQModel",
    "VectorQuantizer",
    "instantiate_from_config",
]


class VQModel(autoencoder.VQModel):
    """Autoencoder with a codebook, with the parameters of taming-transformers; see `ldm.models.autoencoder.VQModel`."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        remap: str | None = None,
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__(
            ddconfig,
            lossconfig,
            n_embed,
            embed_dim,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            monitor=monitor,
            remap=remap,
            sane_index_shape=sane_index_shape,
        )
        self.build_quantizer(ddconfig, remap)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def build_quantizer(self, ddconfig: Mapping[str, Any], remap: str | None) -> None:
        """Replace the quantizer; subclasses implement it."""


class EMAVQ(VQModel):
    """`VQModel` whose codebook holds moving averages of the latents."""

    def build_quantizer(self, ddconfig: Mapping[str, Any], remap: str | None) -> None:
        """Replace the quantizer by an `EMAVectorQuantizer`."""
        self.quantize = EMAVectorQuantizer(self.n_embed, self.embed_dim, beta=0.25, remap=remap)


class GumbelVQ(VQModel):
    """`VQModel` that samples the entries of the codebook with the Gumbel softmax.

    Args:
        temperature_scheduler_config: target and parameters of a function from the number of a step to the temperature.
        kl_weight: see `GumbelQuantize`.
        ddconfig, lossconfig, n_embed, embed_dim, ckpt_path, ignore_keys: see `VQModel`.
        image_key, colorize_nlabels, monitor, remap: see `VQModel`.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        temperature_scheduler_config: Mapping[str, Any],
        ckpt_path: str | None = None,
        ignore_keys: Iterable[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        kl_weight: float = 1e-8,
        remap: str | None = None,
    ) -> None:
        self.kl_weight = kl_weight
        super().__init__(
            ddconfig,
            lossconfig,
            n_embed,
            embed_dim,
            ckpt_path,
            ignore_keys,
            image_key,
            colorize_nlabels,
            monitor,
            remap,
        )
        self.vocab_size = n_embed
        self.temperature_scheduler = instantiate_from_config(temperature_scheduler_config)
        self.temperature_scheduling()

    def temperature_scheduling(self, step: int = 0) -> None:
        """Set the temperature of a training step."""
        self.quantize.temperature = self.temperature_scheduler(step)

    def adversarial_loss(
        self, rec: autoencoder.Reconstruction, optimizer_idx: int, global_step: int, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `Autoencoder.adversarial_loss`, and set the temperature of the next training step."""
        if split == "train":
            self.temperature_scheduling(global_step + 1)
        return super().adversarial_loss(rec, optimizer_idx, global_step, split)

    def build_quantizer(self, ddconfig: Mapping[str, Any], remap: str | None) -> None:
        """Replace the quantizer by a `GumbelQuantize`."""
        self.quantize = GumbelQuantize(
            ddconfig["z_channels"], self.embed_dim, self.n_embed, kl_weight=self.kl_weight, remap=remap
        )

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Decode codebook indices (B, h, w) to an image."""
        return self.decode(self.quantize.get_codebook_entry(code_b, (*code_b.shape, self.embed_dim)))
