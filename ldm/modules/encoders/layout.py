"""Layouts as tokens: what a layout-to-image model reads, and what its tokens mean.

A box is three tokens: its class, its top-left corner and its bottom-right corner. A corner is a cell of a square
grid over the layout, counted along the rows. The last token of the vocabulary stands where there is no box.
Sequences two tokens longer than their boxes end with the corners of a window: the part of the layout that the
picture shows.

Positions are (left, top, right, bottom) in [0, 1] of the width and height.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldm.errors import UserError

WHOLE = (0.0, 0.0, 1.0, 1.0)
Position = tuple[float, float, float, float]


class Box(NamedTuple):
    """An object of a layout."""

    label: int
    position: Position


class LayoutTokens:
    """The vocabulary of layouts.

    Args:
        vocab_size: number of tokens; the grid has as many cells a side as its square root holds, and the classes
            count from 0 to at most `vocab_size` - 2.
    """

    def __init__(self, vocab_size: int) -> None:
        self.side = math.isqrt(vocab_size)
        self.none = vocab_size - 1

    def encode(self, boxes: Sequence[Box], length: int, window: Position = WHOLE) -> torch.Tensor:
        """Tokens (length,) int64 of at most length // 3 boxes; `window` is told where there is room for it.

        Raises:
            UserError: too many boxes, an unknown class, or a corner outside the layout.
        """
        if len(boxes) > length // 3:
            raise UserError(f"{len(boxes)} boxes do not fit into {length} tokens; give at most {length // 3}")
        for box in boxes:
            if not 0 <= box.label < self.none:
                raise UserError(f"a box has the class {box.label}; classes go from 0 to {self.none - 1}")
        triples = [[box.label, *self._corners(box.position)] for box in boxes]
        triples += [[self.none] * 3] * (length // 3 - len(boxes))
        ending = self._corners(window) if length % 3 == 2 else [self.none] * (length % 3)
        return torch.tensor([*(token for triple in triples for token in triple), *ending], dtype=torch.int64)

    def decode(self, tokens: torch.Tensor) -> list[Box]:
        """The boxes that tokens (L,) tell of, placed in the window; parts outside it lie outside [0, 1]."""
        ids = [int(token) for token in tokens]
        window = self._position(*ids[-2:]) if len(ids) % 3 == 2 else WHOLE
        left, top, right, bottom = window or WHOLE
        width, height = max(right - left, 1 / self.side), max(bottom - top, 1 / self.side)
        boxes = []
        for at in range(0, len(ids) - len(ids) % 3, 3):
            label, position = ids[at], self._position(*ids[at + 1 : at + 3])
            if label != self.none and position is not None:
                x0, y0, x1, y1 = position
                placed = ((x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height)
                boxes.append(Box(label, placed))
        return boxes

    def _corners(self, position: Position) -> list[int]:
        if not all(0 <= value <= 1 for value in position):
            raise UserError(f"a box reaches from {position[:2]} to {position[2:]}; positions lie in [0, 1]")
        column0, row0, column1, row1 = (round(value * (self.side - 1)) for value in position)
        return [row0 * self.side + column0, row1 * self.side + column1]

    def _position(self, first: int, last: int) -> Position | None:
        """Where the corners lie; None for what is no corner."""
        if not (0 <= first < self.side**2 and 0 <= last < self.side**2):
            return None
        (row0, column0), (row1, column1) = (divmod(corner, self.side) for corner in (first, last))
        x0, y0, x1, y1 = (cell / (self.side - 1) for cell in (column0, row0, column1, row1))
        return x0, y0, x1, y1
