"""Base class of the tasks that restore images: large ones are sampled in overlapping tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.pipeline import SamplerPipeline, check_count


@dataclass(frozen=True, kw_only=True)
class TiledPipeline(SamplerPipeline):
    """Pipeline that may sample large images in overlapping tiles, blended at every step, so that no seams show.

    Args:
        tile: side of a tile in pixels of the result; 0 samples images whole.
    """

    tile: int = 0

    def check(self, info: ModelInfo) -> None:
        """See `Pipeline.check`."""
        super().check(info)
        check_count("tile", self.tile)
        smallest = 2 * info.size.multiple  # the smallest map of the network needs more than one value
        if 0 < self.tile < smallest:
            raise UserError(f"tile {self.tile} is too small for this model; give {smallest} or more, or 0 for none")
        info.size.check("tile", self.tile)

    def latent_tile(self, model: Any) -> int | None:
        """Return the side of a tile in latents."""
        return self.tile // model.downsampling or None

    def side_of_decoding_tiles(self, model: Any) -> int | None:
        """See `SamplerPipeline.side_of_decoding_tiles`; the side of the sampled tiles unless the task has its own."""
        return self.decoding_tile or self.latent_tile(model)
