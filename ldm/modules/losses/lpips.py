"""Learned perceptual image distance: LPIPS, version 0.1 on VGG16 features (arXiv 1801.03924)."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_state_dict

logger = logging.getLogger(__name__)

# VGG16 (arXiv 1409.1556): channels of the 3 x 3 convolutions of each slice. Every convolution is followed by a
# rectifier; every slice but the first begins with a 2 x 2 max-pooling.
VGG16_SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class ScalingLayer(nn.Module):
    """From [-1, 1] to the statistics that the features were trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        return (x - self.shift) / self.scale


class VGG16Features(nn.Module):
    """The activations at the end of each slice of VGG16.

    Layers keep their index in torchvision's `vgg16().features` as their name: `slice2.5.weight` is `features.5.weight`.
    """

    def __init__(self) -> None:
        super().__init__()
        index, channels = 0, 3
        for number, widths in enumerate(VGG16_SLICES, start=1):
            layers = nn.Sequential()
            if number > 1:
                layers.add_module(str(index), nn.MaxPool2d(2))
                index += 1
            for width in widths:
                layers.add_module(str(index), nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers.add_module(str(index + 1), nn.ReLU(inplace=True))
                index, channels = index + 2, width
            self.add_module(f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> five maps, (B, C_i, H / 2^i, W / 2^i)."""
        activations = []
        for layers in self.children():
            x = layers(x)
            activations.append(x)
        return activations


class ChannelWeights(nn.Module):
    """The learned weight of each channel in the distance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Position 0 was a dropout while the weights were learned; nothing is dropped here.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, kernel_size=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W)."""
        return self.model(x)


class LPIPS(nn.Module):
    """How different two images look. Frozen, and always in evaluation mode.

    Building it reads and fetches nothing: the weights are NaN, and whoever fills them first (a checkpoint, or
    `prepare`, which the first use calls) decides what they are. So a model that is restored needs no download,
    and using weights that were never filled cannot go unnoticed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, widths in enumerate(VGG16_SLICES):
            self.add_module(f"lin{i}", ChannelWeights(widths[-1]))
        self._prepared = False
        self.requires_grad_(False)
        for weight in self.parameters():
            weight.fill_(float("nan"))
        self.train(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in evaluation mode whatever the `mode`."""
        return super().train(False)

    @torch.no_grad()
    def prepare(self) -> None:
        """Load the pretrained weights unless there are weights already.

        Raises:
            UserError: they cannot be had; the message says from where they were wanted.
        """
        if any(weight.isnan().any() for weight in self.parameters()):
            weights = pretrained_weights()
            for name, weight in self.named_parameters():
                weight.copy_(weights[name])
        self._prepared = True

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Distances between two batches of images.

        Args:
            input, target: (B, 3, H, W) in [-1, 1]; height and width at least 16.

        Returns:
            (B, 1, 1, 1), at least 0.
        """
        if not self._prepared:
            self.prepare()
        features = zip(self.net(self.scaling_layer(input)), self.net(self.scaling_layer(target)), strict=True)
        total = 0.0
        for i, (of_input, of_target) in enumerate(features):
            difference = (_unit_length(of_input) - _unit_length(of_target)).square()
            total = total + getattr(self, f"lin{i}")(difference).mean(dim=(2, 3), keepdim=True)
        return total


def _unit_length(x: Tensor) -> Tensor:
    """Scale the channels at every position to length 1."""
    # vector_norm has gradient 0 where all channels are 0; a square root would give NaN there.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def pretrained_weights() -> dict[str, Tensor]:
    """The published weights under the names of `LPIPS`: the channel weights of `lpips`, the features of torchvision.

    Raises:
        UserError: a package is missing or the download failed.
    """
    features = _vgg16_weights()
    names = [name for name, _ in VGG16Features().named_parameters()]
    return {**_channel_weights(), **{f"net.{name}": features[f"features.{name.partition('.')[2]}"] for name in names}}


def _channel_weights() -> dict[str, Tensor]:
    # Found without importing the package, which would build networks of its own.
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise _unavailable('the package "lpips" is not installed (pip install lpips)')
    path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    if not path.is_file():
        raise _unavailable(f'"{path}" is missing (reinstall the package "lpips")')
    return read_state_dict(path)


def _vgg16_weights() -> dict[str, Tensor]:
    try:
        from torchvision.models import VGG16_Weights
    except ImportError as error:
        raise _unavailable(f'the package "torchvision" cannot be used ({error})') from error
    source = VGG16_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
    if not path.is_file():
        logger.info("fetching %s (528 MB) to %s", source.url, path)
    try:
        return source.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # No network, no space, another file's hash, or a damaged file.
        raise _unavailable(f'{source.url} could not be fetched or read ({error}); put it at "{path}"') from error


def _unavailable(reason: str) -> UserError:
    return UserError(f"LPIPS has no weights: {reason}, or do without it (in training: perceptual_weight: 0)")
