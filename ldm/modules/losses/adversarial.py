"""Base of the two first-stage losses: perceptual network, discriminator and their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.modules.losses.discriminator import NLayerDiscriminator, weights_init
from ldm.modules.losses.lpips import LPIPS, MIN_SIZE


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator (arXiv:1705.02894); it is 0 for real logits ≥ 1 and fake logits ≤ -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the cross-entropy of a discriminator (arXiv:1406.2661)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def hinge_d_loss_with_exemplar_weights(logits_real: Tensor, logits_fake: Tensor, weights: Tensor) -> Tensor:
    """Return the hinge loss of a discriminator with a weight for each image.

    Args:
        logits_real, logits_fake: (B, 1, h, w).
        weights: (B,).

    Raises:
        ValueError: the batch sizes differ.
    """
    if not weights.shape[0] == logits_real.shape[0] == logits_fake.shape[0]:
        sizes = f"{weights.shape[0]}, {logits_real.shape[0]} and {logits_fake.shape[0]}"
        raise ValueError(f"weights, real and fake logits must have the same batch size, got {sizes}")
    real = F.relu(1.0 - logits_real).mean(dim=(1, 2, 3))
    fake = F.relu(1.0 + logits_fake).mean(dim=(1, 2, 3))
    return 0.5 * ((weights * real).sum() + (weights * fake).sum()) / weights.sum()


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return `value` before step `threshold` and `weight` from that step on."""
    return value if global_step < threshold else weight


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the elementwise absolute difference."""
    return torch.abs(x - y)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the elementwise squared difference."""
    return (x - y).square()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


class AdversarialLoss(nn.Module):
    """Base class of the first-stage losses: reconstruction error and a discriminator (arXiv:2012.09841).

    Args:
        disc_start: global step at which the adversarial terms start.
        pixelloss_weight: weight of the pixel-wise error.
        disc_num_layers, disc_in_channels, use_actnorm, disc_ndf: see `NLayerDiscriminator`.
        disc_factor: weight of both adversarial terms from `disc_start` on; 0 omits the discriminator.
        disc_weight: factor of the adaptive weight of the generator's adversarial term.
        perceptual_weight: weight of the perceptual distance; 0 omits the perceptual network.
        disc_conditional: pass the image and `cond` to the discriminator; `disc_in_channels` is their total.
        disc_loss: "hinge" or "vanilla".

    Raises:
        UserError: `disc_loss` is unknown.
    """

    def __init__(
        self,
        disc_start: int,
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
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise UserError(f'disc_loss "{disc_loss}" is unknown; choose one of {", ".join(DISCRIMINATOR_LOSSES)}')
        self.pixel_weight = pixelloss_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS() if perceptual_weight > 0 else None
        self.discriminator: nn.Module | None = None
        if disc_factor > 0:
            discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            self.discriminator = discriminator.apply(weights_init)
        self.discriminator_iter_start = disc_start
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional

    def prepare(self) -> None:
        """Load the pretrained perceptual weights if they are needed and not loaded.

        The first forward pass also loads them. A trainer calls this method first to report a failure early.

        Raises:
            UserError: the weights are not available.
        """
        if self.perceptual_loss is not None:
            self.perceptual_loss.prepare()

    def check_images(self, inputs: Tensor, reconstructions: Tensor) -> None:
        """Check that images (B, C, H, W) fit the perceptual network and an unconditional discriminator.

        Raises:
            UserError: they do not; the message names the option to change.
        """
        (channels, *size), outputs = inputs.shape[1:], reconstructions.shape[1]
        if outputs != channels:
            raise UserError(
                f"the first stage maps {channels} channels to {outputs}; set ddconfig.out_ch to ddconfig.in_channels"
            )
        if self.perceptual_loss is not None and channels not in (1, 3):
            raise UserError(
                f"the perceptual network takes 1 or 3 channels, and the images have {channels}; "
                "set perceptual_weight: 0"
            )
        if self.perceptual_loss is not None and min(size) < MIN_SIZE:
            raise UserError(
                f"images of {size[0]} x {size[1]} pixels are too small for the perceptual network, which needs "
                f"{MIN_SIZE} x {MIN_SIZE}; set perceptual_weight: 0"
            )
        if self.discriminator is None:
            return
        if self.disc_conditional:
            raise UserError("first stages are trained without a conditioning; set disc_conditional: false")
        if self.discriminator.in_channels != channels:
            raise UserError(
                f"the discriminator takes {self.discriminator.in_channels} channels, and the images have {channels}; "
                f"set disc_in_channels: {channels} in the lossconfig"
            )

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None = None) -> Tensor:
        """Return the adaptive weight of the adversarial term (arXiv:2012.09841, equation 7).

        It is the ratio of the two gradient norms at `last_layer`, clamped to [0, 10^4], times `disc_weight`.

        Raises:
            ValueError: there is no `last_layer`, the weight of the last convolution.
        """
        if last_layer is None:
            raise ValueError("the adversarial term needs last_layer, the weight of the last convolution")
        (nll_grad,) = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)
        (g_grad,) = torch.autograd.grad(g_loss, last_layer, retain_graph=True)
        ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.discriminator_weight

    def perceptual_distance(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the unweighted perceptual distance (B, 1, 1, 1), or zeros without a perceptual network."""
        if self.perceptual_loss is None:
            return inputs.new_zeros(inputs.shape[0], 1, 1, 1)
        return self.perceptual_loss(inputs, reconstructions)

    def discriminate(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """Return the logits of the discriminator for `images` (B, C, H, W), concatenated with `cond` if it is given."""
        if self.disc_conditional != (cond is not None):
            needs = "needs" if self.disc_conditional else "takes no"
            raise ValueError(f"the loss with disc_conditional={self.disc_conditional} {needs} cond")
        assert self.discriminator is not None
        return self.discriminator(images if cond is None else torch.cat((images, cond), dim=1))

    def generator_terms(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        global_step: int,
        last_layer: Tensor | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted adversarial term of the generator and its log entries."""
        zero = nll_loss.new_zeros(())
        disc_factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        g_loss, d_weight = zero, zero
        if self.discriminator is not None:
            g_loss = -self.discriminate(reconstructions, cond).mean()
            if reconstructions.requires_grad:  # not in validation
                d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        log = {"d_weight": d_weight, "disc_factor": zero + disc_factor, "g_loss": g_loss.detach()}
        # Before disc_start the term is only logged, without a backward pass through the discriminator.
        return d_weight * disc_factor * g_loss if disc_factor else zero, log

    def discriminator_step(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the discriminator on detached images and its log entries."""
        if self.discriminator is None:
            raise ValueError("there is no discriminator to train because disc_factor is 0")
        logits_real = self.discriminate(inputs.detach(), cond)
        logits_fake = self.discriminate(reconstructions.detach(), cond)
        disc_factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        loss = disc_factor * self.disc_loss(logits_real, logits_fake)
        log = {"disc_loss": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
        return loss, named_log(log, split)


def named_log(log: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Return the detached entries of `log`, with the prefix `split/` in their keys."""
    return {f"{split}/{key}": value.detach() for key, value in log.items()}
