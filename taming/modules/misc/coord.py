from torch import Tensor
from torch.nn import functional as F


class CoordStage:
    """Stage whose code is a map of coordinates, averaged down and rounded to `n_embed` levels.

    Args:
        n_embed: number of levels.
        down_factor: factor by which the map is reduced.
    """

    def __init__(self, n_embed: int, down_factor: int) -> None:
        self.n_embed = n_embed
        self.down_factor = down_factor

    def eval(self) -> "CoordStage":
        """Return the stage, which has no weights."""
        return self

    def encode(self, c: Tensor) -> tuple[Tensor, None, list[Tensor | None]]:
        """Return the rounded map (B, 1, h, w), None and (None, None, levels (B, h · w)) of a map c in [0, 1]."""
        if c.min() < 0.0 or c.max() > 1.0:
            raise ValueError("coordinates must lie in [0, 1]")
        small = F.interpolate(c, scale_factor=1 / self.down_factor, mode="area")
        levels = (small.clamp(0.0, 1.0) * self.n_embed).round()
        return levels / self.n_embed, None, [None, None, levels.long().flatten(1)]

    def decode(self, c: Tensor) -> Tensor:
        """Return a map (B, 1, h, w), enlarged by `down_factor` with the nearest pixel."""
        return F.interpolate(c, scale_factor=self.down_factor, mode="nearest")
