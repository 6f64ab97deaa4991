"""Token encoding of layouts for layout-to-image models.

A box has three tokens: its class, its top-left corner and its bottom-right corner. A corner is the index of a cell of
a square grid over the layout, counted row by row. The last token of the vocabulary stands for "no box".
A sequence of 3 n + 2 tokens ends with the two corners of a window, the part of the layout that the image shows.

Positions are (left, top, right, bottom), relative to width and height in [0, 1].

A class token may also hold attributes of the object, as published for OpenImages: the token is
`label + classes * bits`, where `bits` has one bit for each of `ATTRIBUTES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldm.errors import UserError
from ldm.io.checkpoint.names import first_names

FULL_WINDOW = (0.0, 0.0, 1.0, 1.0)
ATTRIBUTES = ("group", "occluded", "depiction", "inside")  # the bits 1, 2, 4 and 8 of an object
Position = tuple[float, float, float, float]


class Box(NamedTuple):
    """Object of a layout: class index, position, and a name for messages."""

    label: int
    position: Position
    name: str = ""


def attribute_names(bits: int) -> list[str]:
    """Return the names of the attributes whose bits are set."""
    return [name for number, name in enumerate(ATTRIBUTES) if bits & (1 << number)]


class LayoutTokens:
    """Encoder and decoder between boxes and layout tokens.

    Args:
        vocab_size: number of tokens. The grid has floor(√vocab_size) cells per side. Classes are numbered from 0 to at
            most `vocab_size` - 2.
    """

    def __init__(self, vocab_size: int) -> None:
        self.side = math.isqrt(vocab_size)
        self.none = vocab_size - 1

    def encode(self, boxes: Sequence[Box], length: int, window: Position = FULL_WINDOW) -> torch.Tensor:
        """Encode at most `length` // 3 boxes to tokens (length,) int64.

        The tokens end with `window` if `length` has the form 3 n + 2.

        Raises:
            UserError: there are too many boxes, a class is unknown, or a corner is outside the layout.
        """
        if len(boxes) > length // 3:
            names = first_names(f'"{box.name or box.label}"' for box in boxes[length // 3 :])
            raise UserError(
                f"{len(boxes)} boxes do not fit into {length} tokens; give at most {length // 3} (too many: {names})"
            )
        for box in boxes:
            if not 0 <= box.label < self.none:
                raise UserError(f"a box has the class {box.label}; classes go from 0 to {self.none - 1}")
        triples = [[box.label, *self._corners(box.position)] for box in boxes]
        triples += [[self.none] * 3] * (length // 3 - len(boxes))
        ending = self._corners(window) if length % 3 == 2 else [self.none] * (length % 3)
        return torch.tensor([*(token for triple in triples for token in triple), *ending], dtype=torch.int64)

    def window(self, tokens: torch.Tensor) -> Position:
        """Return the window at the end of tokens (L,), and the whole layout if they have none."""
        ids = [int(token) for token in tokens[-2:]]
        return (self._position(*ids) if len(tokens) % 3 == 2 else None) or FULL_WINDOW

    def decode(self, tokens: torch.Tensor, window: Position | None = None) -> list[Box]:
        """Decode tokens (L,) to boxes with positions relative to a window; they may exceed [0, 1].

        Args:
            tokens: the tokens of a layout.
            window: the window; None means that of the tokens, `FULL_WINDOW` the whole layout.
        """
        ids = [int(token) for token in tokens]
        left, top, right, bottom = self.window(tokens) if window is None else window
        width, height = max(right - left, 1 / self.side), max(bottom - top, 1 / self.side)
        boxes = []
        for start in range(0, len(ids) - len(ids) % 3, 3):
            label, position = ids[start], self._position(*ids[start + 1 : start + 3])
            if label != self.none and position is not None:
                x0, y0, x1, y1 = position
                relative = ((x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height)
                boxes.append(Box(label, relative))
        return boxes

    def corner(self, x: float, y: float) -> int:
        """Return the token of the cell at (x, y)."""
        column, row = (round(value * (self.side - 1)) for value in (x, y))
        return row * self.side + column

    def coordinates(self, token: int) -> tuple[float, float]:
        """Return the position (x, y) of the cell of a corner token."""
        row, column = divmod(token, self.side)
        return column / (self.side - 1), row / (self.side - 1)

    def _corners(self, position: Position) -> list[int]:
        if not all(0 <= value <= 1 for value in position):
            raise UserError(f"a box extends from {position[:2]} to {position[2:]}; positions must lie in [0, 1]")
        return [self.corner(*position[:2]), self.corner(*position[2:])]

    def _position(self, first: int, last: int) -> Position | None:
        """Return the position of two corner tokens, or None if one of them is not a corner."""
        if not (0 <= first < self.side**2 and 0 <= last < self.side**2):
            return None
        return *self.coordinates(first), *self.coordinates(last)
