"""Square windows of images: one crop and mirroring for an image and for everything that lies beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling


@dataclass(frozen=True)
class Window:
    """Square window of an image.

    Attributes:
        left, top, right, bottom: its edges, as fractions of the width and height of the image.
        flip: mirror the window from left to right.
    """

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False

    def view(self, image: Image, size: int, method: Resampling) -> Image:
        """Return the window of an image, resized to `size` × `size` pixels.

        The image may have any resolution. Only the pixels of the window are resampled.
        """
        from PIL.Image import Transpose

        width, height = image.size
        left, right = (min(_snapped(edge * width), width) for edge in (self.left, self.right))
        top, bottom = (min(_snapped(edge * height), height) for edge in (self.top, self.bottom))
        view = image.resize((size, size), method, (left, top, right, bottom))
        return view.transpose(Transpose.FLIP_LEFT_RIGHT) if self.flip else view


def find_window(
    width: int, height: int, size: int, random: bool, flip_p: float, crop_size: int | None = None
) -> Window:
    """Return a window that shows the whole smaller side of an image, or with `crop_size` a part of it.

    The image is thought of as resized, so that its smaller side is `size`. The window begins at a whole pixel of it.

    Args:
        width, height: size of the image.
        size: side of the window in pixels.
        random: choose a random position along the larger side; otherwise the window is central.
        flip_p: probability of mirroring. PyTorch's global generator determines it and the position.
        crop_size: side of the window, if it is smaller than `size`, to which the smaller side is resized.
    """
    side, crop = min(width, height), crop_size or size
    columns, rows = (max(size, round(length * size / side)) for length in (width, height))
    x, y, mirroring = torch.rand(3).tolist() if random or flip_p > 0 else (0.0, 0.0, 1.0)
    left, top = (
        int(position * (margin + 1)) if random else margin // 2
        for position, margin in ((x, columns - crop), (y, rows - crop))
    )
    return Window(left / columns, top / rows, (left + crop) / columns, (top + crop) / rows, mirroring < flip_p)


def _snapped(value: float) -> float:
    """Return a position without the error of rounding, so that a window of whole pixels copies them."""
    return float(round(value)) if abs(value - round(value)) < 1e-6 else value
