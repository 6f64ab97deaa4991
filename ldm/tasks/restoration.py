"""What filling and enlarging pictures have in common: one result for a picture, whole or drawn in overlapping tiles."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.model_config import ImageSize
from ldm.errors import UserError
from ldm.tasks.task import Inputs, Settings, Task

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise


class Restoration(Task):
    """A task whose `settings` have `tile`, the side of tiles in pixels of the result, or 0 for none."""

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Named like the picture, in the place of an earlier result, as published."""
        return outdir / f"{inputs['name']}.png"

    def sheet_columns(self, args: argparse.Namespace) -> int:
        """Two pictures and their results in a row."""
        return 2

    @staticmethod
    def check_tile(size: ImageSize, tile: int) -> int:
        """`tile`, if a model of that size can draw in such tiles.

        Raises:
            UserError: it cannot.
        """
        if 0 < tile < 2 * size.multiple:  # the network's smallest map has to have more than one value
            raise UserError(
                f"--tile {tile} is too small for this model; give {2 * size.multiple} or more, or 0 for none"
            )
        return size.check("--tile", tile)

    @staticmethod
    def sample(model: Any, conditioning: Tensor, settings: Settings, noise: SeededNoise, progress: tqdm) -> Tensor:
        """The latents, as large as the `(N, C, h, w)` that they are drawn from."""
        from ldm.modules.tiles import TiledDenoiser
        from ldm.pipelines.sampling import SamplerSettings, sample_latents

        tile = settings["tile"] // model.downsampling
        denoiser = TiledDenoiser(model, tile, tile // 4) if tile else model
        shape = (len(conditioning), model.channels, *conditioning.shape[2:])
        sampling = SamplerSettings.of(settings)
        return sample_latents(denoiser, shape, sampling, conditioning, noise=noise, progress=progress)
