"""Loss of the autoencoder with a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.compat import published_names
from ldm.errors import UserError
from ldm.modules.losses.adversarial import (
    AdversarialLoss,
    adopt_weight,
    hinge_d_loss,
    hinge_d_loss_with_exemplar_weights,
    l1,
    l2,
    named_log,
    vanilla_d_loss,
)
from ldm.modules.losses.contperceptual import DummyLoss

__all__ = [
    "DummyLoss",
    "VQLPIPSWithDiscriminator",
    "adopt_weight",
    "hinge_d_loss",
    "hinge_d_loss_with_exemplar_weights",
    "l1",
    "l2",
    "measure_perplexity",
    "vanilla_d_loss",
]

__getattr__ = published_names(__name__)

PIXEL_LOSSES = {"l1": l1, "l2": l2}


@torch.no_grad()
def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Return the perplexity of the codebook use: 1 for a single entry, `n_embed` for uniform use of all entries.

    Args:
        predicted_indices: codebook indices of any shape.
        n_embed: size of the codebook.

    Returns:
        The perplexity of the frequencies and the number of used entries.
    """
    counts = torch.bincount(predicted_indices.flatten(), minlength=n_embed)
    frequencies = counts / counts.sum()
    perplexity = torch.exp(-(frequencies * torch.log(frequencies + 1e-10)).sum())
    return perplexity, (counts > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Pixel-wise and perceptual error, codebook loss and a discriminator (VQGAN, arXiv:2012.09841).

    The base class `AdversarialLoss` documents the other arguments.

    Args:
        codebook_weight: weight of the codebook loss.
        n_classes: size of the codebook, for logging its perplexity; None logs no perplexity.
        perceptual_loss: "lpips".
        pixel_loss: "l1" or "l2".

    Raises:
        UserError: `perceptual_loss`, `pixel_loss` or `disc_loss` is unknown.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
    ) -> None:
        if perceptual_loss != "lpips":
            raise UserError(f'perceptual_loss "{perceptual_loss}" is unknown; use "lpips"')
        if pixel_loss not in PIXEL_LOSSES:
            raise UserError(f'pixel_loss "{pixel_loss}" is unknown; choose one of {", ".join(PIXEL_LOSSES)}')
        super().__init__(
            disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_ndf=disc_ndf,
            disc_loss=disc_loss,
        )
        self.codebook_weight = codebook_weight
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the autoencoder or the discriminator, averaged over pixels and batch.

        Args:
            codebook_loss: loss of the quantizer.
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: training step, compared with `disc_start`.
            last_layer: weight of the last convolution of the decoder.
            cond: additional input (B, C', H, W) of a conditional discriminator.
            split: prefix of the log's keys.
            predicted_indices: codebook indices of any shape, for logging the perplexity.

        Returns:
            The loss and the log entries.
        """
        if optimizer_idx == 1:
            return self.discriminator_step(inputs, reconstructions, global_step, cond, split)
        p_loss = self.perceptual_distance(inputs, reconstructions).mean()
        pixel_loss = self.pixel_loss(inputs, reconstructions).mean()
        nll_loss = self.pixel_weight * pixel_loss + self.perceptual_weight * p_loss
        adversarial, log = self.generator_terms(nll_loss, reconstructions, global_step, last_layer, cond)
        quant_loss = codebook_loss.mean()
        loss = nll_loss + adversarial + self.codebook_weight * quant_loss
        log = {
            "total_loss": loss,
            "quant_loss": quant_loss,
            "nll_loss": nll_loss,
            "rec_loss": nll_loss,
            "p_loss": p_loss,
            **log,
        }
        if predicted_indices is not None and self.n_classes is not None:
            log["perplexity"], log["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes)
        return loss, named_log(log, split)
