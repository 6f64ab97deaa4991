# Programs import everything from here, including the modules of torch that the published file imported.
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.losses.discriminator import NLayerDiscriminator, weights_init
from ldm.modules.losses.lpips import LPIPS
from ldm.modules.losses.vqperceptual import (
    DummyLoss,
    VQLPIPSWithDiscriminator,
    adopt_weight,
    hinge_d_loss,
    vanilla_d_loss,
)

__all__ = [
    "LPIPS",
    "DummyLoss",
    "F",
    "NLayerDiscriminator",
    "VQLPIPSWithDiscriminator",
    "adopt_weight",
    "hinge_d_loss",
    "nn",
    "torch",
    "vanilla_d_loss",
    "weights_init",
]
