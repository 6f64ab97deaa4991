"""Learned perceptual image patch similarity: LPIPS, version 0.1, on VGG16 features (arXiv:1801.03924)."""

from __future__ import annotations

import importlib.util
import logging
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config.distribution import install_hint
from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_state_dict

logger = logging.getLogger(__name__)

# VGG16 (arXiv:1409.1556): channels of the 3 x 3 convolutions of each slice. A ReLU follows every convolution. Every
# slice except the first starts with 2 x 2 max-pooling.
VGG16_SLICES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Smallest height and width of an image: one position is left after the last pooling.
MIN_SIZE = 2 ** (len(VGG16_SLICES) - 1)


class ScalingLayer(nn.Module):
    """Normalisation of images in [-1, 1] to the channel statistics of the VGG16 training data."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, inp: Tensor) -> Tensor:
        """Map (B, 3, H, W) to the same shape."""
        return (inp - self.shift) / self.scale


class VGG16Features(nn.Module):
    """VGG16 network that returns the activations of each slice.

    The name of a layer is its index in torchvision's `vgg16().features`: `slice2.5.weight` is `features.5.weight`.
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
        """Map (B, 3, H, W) to five feature maps (B, C_i, H / 2^i, W / 2^i)."""
        activations = []
        for layers in self.children():
            x = layers(x)
            activations.append(x)
        return activations


class ChannelWeights(nn.Module):
    """Learned weights of the channels in the distance."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Index 0 was a dropout layer in the training of these weights; the state-dict keys depend on it.
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, kernel_size=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 1, H, W)."""
        return self.model(x)


class LPIPS(nn.Module):
    """Perceptual distance between two images, frozen and always in evaluation mode.

    A new module reads and downloads nothing: its weights are NaN. A checkpoint or `prepare` sets them; the first
    forward pass calls `prepare`. A restored model therefore needs no download, and unset weights are detected.

    Args:
        use_dropout: part of the published signature; the dropout of the channel weights is never active here.
    """

    def __init__(self, use_dropout: bool = True) -> None:
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
        """Keep evaluation mode for every `mode`."""
        return super().train(False)

    @torch.no_grad()
    def prepare(self) -> None:
        """Load the pretrained weights unless the weights are set.

        Raises:
            UserError: the weights are not available.
        """
        if any(weight.isnan().any() for weight in self.parameters()):
            weights = pretrained_weights()
            for name, weight in self.named_parameters():
                weight.copy_(weights[name])
        self._prepared = True

    def load_from_pretrained(self, name: str = "vgg_lpips") -> None:
        """Load the pretrained weights `name`, unless the weights are set.

        Raises:
            UserError: there are no such weights, or they are not available.
        """
        if name != "vgg_lpips":
            raise UserError(f'LPIPS has no weights "{name}"; use "vgg_lpips"')
        self.prepare()

    @classmethod
    def from_pretrained(cls, name: str = "vgg_lpips") -> LPIPS:
        """Return a module with the pretrained weights `name`; see `load_from_pretrained`."""
        model = cls()
        model.load_from_pretrained(name)
        return model

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the distances between two batches of images.

        Args:
            input, target: (B, 3, H, W) in [-1, 1]; height and width at least 16.

        Returns:
            Nonnegative distances (B, 1, 1, 1).
        """
        if not self._prepared:
            self.prepare()
        features = zip(self.net(self.scaling_layer(input)), self.net(self.scaling_layer(target)), strict=True)
        total = input.new_zeros(())
        for i, (input_features, target_features) in enumerate(features):
            difference = (_unit_length(input_features) - _unit_length(target_features)).square()
            total = total + getattr(self, f"lin{i}")(difference).mean(dim=(2, 3), keepdim=True)
        return total


def _unit_length(x: Tensor) -> Tensor:
    """Scale the channel vector at every position to length 1."""
    # The gradient of vector_norm is 0 where all channels are 0; that of a square root is NaN.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def pretrained_weights() -> dict[str, Tensor]:
    """Return the published weights by the names of `LPIPS`.

    The channel weights are part of the package torchmetrics, the VGG16 features those of torchvision.

    Raises:
        UserError: a package is missing or the download failed.
    """
    return {**channel_weights(), **{f"net.{name}": weight for name, weight in vgg16_weights().items()}}


def channel_weights() -> dict[str, Tensor]:
    """Return the published weights of the channels, which are a part of the package torchmetrics.

    Raises:
        UserError: the package, or its file, is missing.
    """
    spec = importlib.util.find_spec("torchmetrics")  # does not import the package
    if spec is None or not spec.submodule_search_locations:
        raise _unavailable(f'the package "torchmetrics" is not installed ({install_hint()})')
    path = Path(spec.submodule_search_locations[0]) / "functional" / "image" / "lpips_models" / "vgg.pth"
    if not path.is_file():
        raise _unavailable(f'"{path}" is missing (reinstall the package "torchmetrics")')
    return read_state_dict(path)


def vgg16_weights() -> dict[str, Tensor]:
    """Return the weights of torchvision's VGG16 by the names of `VGG16Features`.

    Raises:
        UserError: torchvision is missing, or the download failed.
    """
    features = _torchvision_weights()
    names = [name for name, _ in VGG16Features().named_parameters()]
    return {name: features[f"features.{name.partition('.')[2]}"] for name in names}


def _torchvision_weights() -> dict[str, Tensor]:
    try:
        from torchvision.models import VGG16_Weights
    except ImportError as error:
        raise _unavailable(f'the package "torchvision" cannot be imported ({error})') from error
    source = VGG16_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
    if not path.is_file():
        logger.info("downloading %s (528 MB) to %s", source.url, path)
    try:
        return source.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # No network, no disk space, a wrong hash or a damaged file.
        raise _unavailable(f'{source.url} cannot be downloaded or read ({error}); put it at "{path}"') from error


def _unavailable(reason: str) -> UserError:
    return UserError(f"LPIPS has no weights: {reason}, or train without it (perceptual_weight: 0)")
