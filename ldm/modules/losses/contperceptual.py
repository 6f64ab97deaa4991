"""Loss of the autoencoder with a continuous latent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, l1, named_log


class DummyLoss(nn.Module):
    """Placeholder for the loss of an autoencoder that is not trained."""


class LPIPSWithDiscriminator(AdversarialLoss):
    """Laplacian likelihood with a perceptual term, KL divergence and a discriminator (arXiv:2112.10752, appendix G).

    The base class `AdversarialLoss` documents the other arguments.

    Args:
        logvar_init: initial logarithm of the output variance, which is shared by all pixels.
        kl_weight: weight of the KL divergence from the standard normal distribution.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
    ) -> None:
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
            disc_loss=disc_loss,
        )
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the autoencoder or the discriminator, summed over pixels and averaged over the batch.

        Args:
            inputs, reconstructions: (B, C, H, W) in [-1, 1].
            posteriors: posterior distribution of the latent of `inputs`.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: training step, compared with `disc_start`.
            last_layer: weight of the last convolution of the decoder.
            cond: additional input (B, C', H, W) of a conditional discriminator.
            split: prefix of the log's keys.
            weights: factors of the likelihood that broadcast against (B, C, H, W).

        Returns:
            The loss and the log entries.
        """
        if optimizer_idx == 1:
            return self.discriminator_step(inputs, reconstructions, global_step, cond, split)
        batch = inputs.shape[0]
        rec_loss = self.pixel_weight * l1(inputs, reconstructions)
        if self.perceptual_loss is not None:
            rec_loss = rec_loss + self.perceptual_weight * self.perceptual_distance(inputs, reconstructions)
        nll = rec_loss / torch.exp(self.logvar) + self.logvar
        nll_loss = nll.sum() / batch
        weighted_nll_loss = nll_loss if weights is None else (weights * nll).sum() / batch
        kl_loss = posteriors.kl().sum() / batch
        adversarial, log = self.generator_terms(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = weighted_nll_loss + self.kl_weight * kl_loss + adversarial
        log = {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss.mean(),
            **log,
        }
        return loss, named_log(log, split)
