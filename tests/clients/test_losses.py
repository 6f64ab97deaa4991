"""Program in the shape of published ones: a fork of the KL loss that takes everything from taming."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

FORK = """
import torch
import torch.nn as nn

from taming.modules.losses.vqperceptual import *


class LPIPSWithDiscriminator(nn.Module):
    def __init__(self, disc_start, kl_weight=1.0, disc_factor=1.0, perceptual_weight=1.0, disc_loss="hinge"):
        super().__init__()
        self.kl_weight = kl_weight
        self.perceptual_loss = LPIPS().eval()
        self.perceptual_weight = perceptual_weight
        self.logvar = nn.Parameter(torch.ones(size=()) * 0.0)
        self.discriminator = NLayerDiscriminator(input_nc=3, n_layers=1, use_actnorm=False).apply(weights_init)
        self.discriminator_iter_start = disc_start
        self.disc_loss = hinge_d_loss if disc_loss == "hinge" else vanilla_d_loss
        self.disc_factor = disc_factor

    def forward(self, inputs, reconstructions, posteriors, optimizer_idx, global_step, last_layer=None, split="train"):
        disc_factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        if optimizer_idx == 0:
            rec_loss = torch.abs(inputs.contiguous() - reconstructions.contiguous())
            if self.perceptual_weight > 0:
                rec_loss = rec_loss + self.perceptual_weight * self.perceptual_loss(inputs, reconstructions)
            nll_loss = torch.sum(rec_loss / torch.exp(self.logvar) + self.logvar) / inputs.shape[0]
            kl_loss = torch.sum(posteriors.kl()) / inputs.shape[0]
            g_loss = -torch.mean(self.discriminator(reconstructions))
            loss = nll_loss + self.kl_weight * kl_loss + disc_factor * g_loss
            return loss, {f"{split}/total_loss": loss.clone().detach().mean()}
        logits_real = self.discriminator(inputs.detach())
        logits_fake = self.discriminator(reconstructions.detach())
        d_loss = disc_factor * self.disc_loss(logits_real, logits_fake)
        smooth = F.softplus(logits_fake).mean()
        return d_loss, {f"{split}/disc_loss": d_loss.clone().detach().mean(), f"{split}/smooth": smooth.detach()}
"""


def test_fork_of_the_loss_trains_a_first_stage(monkeypatch):
    from tiny_models import text_config

    import ldm.config
    from ldm.config.targets import allowing
    from ldm.training.modules import lightning_module
    from ldm.util import instantiate_from_config

    fork = ModuleType("fork.contperceptual")
    exec(compile(FORK, "contperceptual.py", "exec"), vars(fork))
    monkeypatch.setitem(sys.modules, "fork", ModuleType("fork"))
    monkeypatch.setitem(sys.modules, "fork.contperceptual", fork)
    config = text_config()["params"]["first_stage_config"]
    config["params"]["lossconfig"] = {
        "target": "fork.contperceptual.LPIPSWithDiscriminator",
        "params": {"disc_start": 0, "perceptual_weight": 0.0, "kl_weight": 1e-6},
    }
    with allowing():
        ldm.config.allow("fork")
        model = instantiate_from_config(config)
    images = torch.rand(2, 16, 16, 3) * 2 - 1
    rec = model.reconstruct({"image": images})
    loss, log = model.adversarial_loss(rec, 0, 0, split="train")
    loss.backward()
    assert model.decoder.conv_out.weight.grad is not None and set(log) == {"train/total_loss"}
    d_loss, log = model.adversarial_loss(rec, 1, 0, split="train")
    assert d_loss.requires_grad and set(log) == {"train/disc_loss", "train/smooth"}
    _, discriminator = model.optimizer_parameters()
    assert len(discriminator) == len(list(model.loss.discriminator.parameters()))
    assert lightning_module(model).model is model
