"""Seeded noise: every image of a batch has its own generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SeededNoise:
    """Source of standard normal noise in which image b has its own generator, seeded with `seeds[b]`.

    The noise of an image does not depend on the batch that contains it. It is sampled on the CPU, so that every device
    starts from the same noise.

    Args:
        seeds: one seed for each image of the batch, from 0 to 2⁶³ - 1.
        device: device of the returned noise.
        start_seeds: seeds of the first noise of the images, such as the start noise; None is the seed of the image.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        start_seeds: Sequence[int | None] | None = None,
    ) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = device
        self._start = [
            generator if start in (None, seed) else torch.Generator().manual_seed(start)
            for generator, seed, start in zip(self.generators, seeds, start_seeds or [None] * len(seeds), strict=True)
        ]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Return the next noise `(B, …)` float32, or `(1, …)` from the generator of the first image.

        Raises:
            ValueError: the batch size is neither 1 nor the number of seeds.
        """
        batch_size, *item_shape = shape
        if batch_size not in (1, len(self.generators)):
            raise ValueError(f"the noise has {len(self.generators)} seeds and cannot fill a batch of {batch_size}")
        generators, self._start = self._start, self.generators
        noise = [torch.randn(item_shape, generator=generator) for generator in generators[:batch_size]]
        return torch.stack(noise).to(self.device)
