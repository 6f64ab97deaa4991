"""Noise that belongs to pictures: the same for a picture whatever batch it is drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Standard normal noise, picture b's from a generator of its own, seeded with `seeds[b]`.

    Drawn on the CPU whatever the device, so that a GPU starts from the same noise.

    Args:
        seeds: one for each picture of the batch, from 0 to 2⁶³ - 1.
        device: where the noise is needed.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next noise: `(B, …)` float32, or `(1, …)`, which the first picture's generator gives.

        Raises:
            ValueError: the batch is of neither size.
        """
        count, *rest = shape
        if count not in (1, len(self.generators)):
            raise ValueError(f"noise for {len(self.generators)} pictures was asked for a batch of {count}")
        noise = [torch.randn(rest, generator=generator) for generator in self.generators[:count]]
        return torch.stack(noise).to(self.device)
