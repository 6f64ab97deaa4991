from collections import namedtuple

import torch
from torch import Tensor, nn

from ldm.modules.losses.lpips import LPIPS, ScalingLayer, VGG16Features, vgg16_weights
from taming.util import get_ckpt_path

__all__ = ["LPIPS", "NetLinLayer", "ScalingLayer", "get_ckpt_path", "normalize_tensor", "spatial_average", "vgg16"]

VggOutputs = namedtuple("VggOutputs", ["relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"])


class NetLinLayer(nn.Module):
    """1 x 1 convolution without a bias, after a dropout layer if `use_dropout`."""

    def __init__(self, chn_in: int, chn_out: int = 1, use_dropout: bool = False) -> None:
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(chn_in, chn_out, kernel_size=1, bias=False))


class vgg16(VGG16Features):
    """VGG16 network that returns the activations of its five slices by name."""

    def __init__(self, requires_grad: bool = False, pretrained: bool = True) -> None:
        super().__init__()
        self.N_slices = 5
        if pretrained:
            self.load_state_dict(vgg16_weights())
        self.requires_grad_(requires_grad)

    def forward(self, X: Tensor) -> VggOutputs:  # type: ignore[override] # as published, by name
        """Map normalised images (B, 3, H, W) to their activations."""
        return VggOutputs(*super().forward(X))


def normalize_tensor(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Scale the channel vector at every position of (B, C, H, W) to length 1."""
    return x / (torch.sqrt(x.square().sum(dim=1, keepdim=True)) + eps)


def spatial_average(x: Tensor, keepdim: bool = True) -> Tensor:
    """Return the mean of (B, C, H, W) over all positions."""
    return x.mean(dim=(2, 3), keepdim=keepdim)
