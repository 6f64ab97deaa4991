"""Random masks with the settings of Stable Diffusion's in-painting training, after LaMa (arXiv:2109.07161).

A mask is a chain of thick segments, or a few boxes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class MaskMode:
    """Settings of a kind of masks. Lengths are in pixels; upper bounds are excluded.

    Attributes:
        size: side of the images for which the lengths are meant; they shrink with smaller images.
        chains: probability of a chain of segments instead of boxes.
        segments: range of the number of segments.
        length, width: ranges of a segment's length and width.
        boxes: range of the number of boxes.
        side: range of a box's sides.
        margin: distance of boxes from the border.
    """

    size: int
    chains: float
    segments: tuple[int, int]
    length: tuple[int, int]
    width: tuple[int, int]
    boxes: tuple[int, int] = (1, 4)
    side: tuple[int, int] = (30, 150)
    margin: int = 10


MASK_MODES = {
    "256narrow": MaskMode(256, 1.0, (4, 50), (10, 40), (5, 10)),
    "256train": MaskMode(256, 0.5, (1, 5), (10, 200), (5, 100)),
    "512train": MaskMode(512, 0.5, (1, 5), (10, 450), (5, 250), side=(30, 300)),
    "512train-large": MaskMode(512, 0.5, (1, 5), (10, 450), (5, 400), side=(75, 450)),
}


def synthetic_mask(height: int, width: int, mode: MaskMode, random: np.random.Generator) -> np.ndarray:
    """Generate a mask (height, width) float32 of 1 where the image is to be filled, and else 0."""
    mode = _scaled(mode, min(1.0, min(height, width) / mode.size))
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    if random.random() < mode.chains:
        _add_chain(draw, height, width, mode, random)
    else:
        for _ in range(random.integers(*mode.boxes)):
            _add_box(draw, height, width, mode, random)
    return np.asarray(canvas, dtype=np.float32)


def _scaled(mode: MaskMode, factor: float) -> MaskMode:
    """Return a mode for images that are smaller by `factor`."""

    def scaled(bounds: tuple[int, int]) -> tuple[int, int]:
        low, high = (max(1, round(bound * factor)) for bound in bounds)
        return low, max(low + 1, high)

    if factor == 1.0:
        return mode
    lengths = {name: scaled(getattr(mode, name)) for name in ("length", "width", "side")}
    return replace(mode, **lengths, margin=round(mode.margin * factor))  # type: ignore[arg-type] # by their names


def _add_chain(draw: ImageDraw.ImageDraw, height: int, width: int, mode: MaskMode, random: np.random.Generator) -> None:
    """Draw segments, each from its own random point."""
    for _ in range(random.integers(*mode.segments)):
        y, x = int(random.integers(height)), int(random.integers(width))
        angle = random.uniform(0, 2 * np.pi)
        length, thickness = random.integers(*mode.length), int(random.integers(*mode.width))
        end = (x + length * np.sin(angle), y + length * np.cos(angle))
        draw.line([(x, y), end], fill=1, width=thickness, joint="curve")


def _add_box(draw: ImageDraw.ImageDraw, height: int, width: int, mode: MaskMode, random: np.random.Generator) -> None:
    h, w = (int(random.integers(*mode.side)) for _ in range(2))
    left = int(random.integers(mode.margin, max(mode.margin + 1, width - mode.margin - w)))
    top = int(random.integers(mode.margin, max(mode.margin + 1, height - mode.margin - h)))
    draw.rectangle((left, top, left + w - 1, top + h - 1), fill=1)
