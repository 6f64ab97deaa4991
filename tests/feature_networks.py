"""Small random feature networks as TorchScript files, and sets of images for them."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

FEATURES, LOGITS = 6, 4


class TinyNetwork(nn.Module):
    """Random network from images (B, 3, H, W) uint8 to features (B, 6) and logits (B, 4)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("first", torch.randn(FEATURES, 3, 3, 3, generator=generator))
        self.register_buffer("second", torch.randn(FEATURES, LOGITS, generator=generator))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits."""
        maps = torch.nn.functional.conv2d(images.float() / 127.5 - 1.0, self.first)
        features = torch.relu(maps).mean(dim=(2, 3))
        return features, torch.mm(features, self.second)


class WithoutLogits(TinyNetwork):
    """The same network without logits."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Return features."""
        maps = torch.nn.functional.conv2d(images.float() / 127.5 - 1.0, self.first)
        return torch.relu(maps).mean(dim=(2, 3))


class NotANumber(TinyNetwork):
    """Network whose features are NaN."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        """Return NaN."""
        return torch.full((images.shape[0], 6), float("nan"))


def write_network(path: Path, module: nn.Module | None = None) -> Path:
    """Write a network as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script((module or TinyNetwork()).eval()).save(str(path))
    return path


def random_images(count: int, seed: int = 0, size: int = 16) -> np.ndarray:
    """Return images (count, size, size, 3) uint8, each of random colours around a mean of its own."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(40, 215, (count, 1, 1, 3))
    return (means + rng.normal(0, 30, (count, size, size, 3))).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, images: np.ndarray, prefix: str = "") -> Path:
    """Write images as PNG files `000.png …`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{prefix}{number:03}.png")
    return folder
