"""Random masks for the training of in-painting models.

Shapes: masks (H, W, 1) float32, 1 in the masked part and -1 elsewhere.

The kinds "thin", "medium" and "thick" are the narrow, medium and wide masks of LaMa (arXiv:2109.07161, section 2.4 and
supplementary): polygonal chains, dilated by a random width, or rectangles. Their numbers are those of the published
configurations `random_{thin,medium,thick}_256` for images of 256 pixels. They scale with the side of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ldm.errors import UserError, did_you_mean

MAX_COVERAGE = 0.6  # largest masked fraction of an image
STROKES, BOXES = (1, 5), (1, 4)  # number of strokes or boxes, without the upper bound
CORNERS = (3, 9)  # number of corners after the first of a stroke, without the upper bound
STROKE_WIDTH = (0.06, 0.2)  # as a fraction of the image's smaller side
STROKE_LENGTH = (0.1, 0.4)  # between two corners, as a fraction of the image's smaller side
BOX_SIDE = (0.15, 0.55)  # as a fraction of the image's side

LAMA_SIDE = 256  # pixels for which LaMa states its numbers
LAMA_COVERAGE = 0.5  # largest masked fraction (max_tamper_area)
LAMA_SEGMENTS = (1, 6)  # of a chain, without the upper bound
LAMA_ANGLES = 4  # directions of a segment are 0.01, 1.01, 2.01 and 3.01 rad, mirrored in every other chain
LAMA_WIDTH, LAMA_LENGTH = 5, 10  # of the thinnest and of the shortest segment
ATTEMPTS = 100  # a tiny image may have no mask within the bounds


@dataclass(frozen=True)
class Chains:
    """Polygonal chains of LaMa.

    Attributes:
        count: smallest and largest number of chains.
        width, length: ranges of the widths and lengths of segments above the smallest ones, in pixels.
    """

    count: tuple[int, int]
    width: int
    length: int


@dataclass(frozen=True)
class Rectangles:
    """Rectangles of LaMa.

    Attributes:
        count: smallest and largest number of rectangles.
        side: smallest side, and the bound of sides, in pixels.
        margin: smallest distance from the edge of the image, in pixels.
    """

    count: tuple[int, int]
    side: tuple[int, int]
    margin: int


WIDE_BOXES = Rectangles((1, 3), (30, 150), 10)
# Kind → chains, rectangles, and the probability of rectangles. LaMa gives chains the weight 1 and rectangles 0.3.
LAMA: dict[str, tuple[Chains | None, Rectangles | None, float]] = {
    "thin": (Chains((4, 50), 10, 40), None, 0.0),
    "medium": (Chains((4, 5), 50, 100), Rectangles((1, 5), (10, 50), 0), 0.3 / 1.3),
    "thick": (Chains((1, 5), 100, 200), WIDE_BOXES, 0.3 / 1.3),
    "box": (None, WIDE_BOXES, 1.0),
}
MASKS = ("random", *LAMA, "half")


def find_masks(kind: str) -> Callable[[int, int, np.random.Generator], np.ndarray]:
    """Return the function that generates masks of a kind from a height, a width and a random generator.

    Args:
        kind: "random", brush strokes or boxes; "thin", "medium" or "thick", as in LaMa; "box", the boxes of its thick
            masks; or "half", one half of the image.

    Raises:
        UserError: the kind is unknown.
    """
    if kind not in MASKS:
        raise UserError(
            f'there are no masks "{kind}"{did_you_mean(str(kind), MASKS)}; choose one of {", ".join(MASKS)}'
        )
    if kind == "random":
        return random_mask
    return half_mask if kind == "half" else lambda height, width, random: lama_mask(kind, height, width, random)


def random_mask(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Generate a mask of brush strokes or boxes, (height, width, 1), that is not empty and at most `MAX_COVERAGE`."""
    while True:
        canvas = Image.new("1", (width, height))
        draw = ImageDraw.Draw(canvas)
        if random.random() < 0.5:
            for _ in range(random.integers(*STROKES)):
                _stroke(draw, height, width, random)
        else:
            for _ in range(random.integers(*BOXES)):
                _box(draw, height, width, random)
        covered = np.asarray(canvas)
        if 0 < covered.mean() <= MAX_COVERAGE:
            return _as_mask(covered)


def lama_mask(kind: str, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Generate a mask of LaMa, (height, width, 1), that is not empty and at most `LAMA_COVERAGE`.

    Args:
        kind: "thin", "medium", "thick" or "box".
        height, width: size of the image.
        random: random generator.
    """
    chains, rectangles, probability = LAMA[kind]
    for _ in range(ATTEMPTS):
        covered = np.zeros((height, width), np.uint8)
        if rectangles is not None and (chains is None or random.random() < probability):
            _add_rectangles(covered, rectangles, random)
        elif chains is not None:
            _add_chains(covered, chains, random)
        if 0 < covered.mean() <= LAMA_COVERAGE:
            return _as_mask(covered > 0)
    return half_mask(height, width, random)


def half_mask(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Generate a mask of the left, right, upper or lower half, (height, width, 1)."""
    covered = np.zeros((height, width), bool)
    axis, is_first = int(random.integers(2)), bool(random.integers(2))
    half = max(1, covered.shape[axis] // 2)
    part = slice(half) if is_first else slice(covered.shape[axis] - half, None)
    covered[(part,) if axis == 0 else (slice(None), part)] = True
    return _as_mask(covered)


def _as_mask(covered: np.ndarray) -> np.ndarray:
    return np.where(covered, np.float32(1.0), np.float32(-1.0))[..., None]


def _stroke(draw: ImageDraw.ImageDraw, height: int, width: int, random: np.random.Generator) -> None:
    side = min(height, width)
    thickness = max(1, round(side * random.uniform(*STROKE_WIDTH)))
    point = random.uniform(0, (width, height))
    angle = random.uniform(0, 2 * np.pi)
    corners = [tuple(point)]
    for _ in range(random.integers(*CORNERS)):
        angle += random.uniform(-1.5, 1.5)
        step = side * random.uniform(*STROKE_LENGTH) * np.array([np.cos(angle), np.sin(angle)])
        point = (point + step).clip(0, (width, height))
        corners.append(tuple(point))
    draw.line(corners, fill=1, width=thickness, joint="curve")
    for x, y in (corners[0], corners[-1]):
        draw.circle((x, y), thickness / 2, fill=1)


def _box(draw: ImageDraw.ImageDraw, height: int, width: int, random: np.random.Generator) -> None:
    w, h = (max(1, round(length * random.uniform(*BOX_SIDE))) for length in (width, height))
    left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
    draw.rectangle((left, top, left + w - 1, top + h - 1), fill=1)


def _add_chains(covered: np.ndarray, chains: Chains, random: np.random.Generator) -> None:
    """Set the pixels of polygonal chains to 1; each segment has round ends and a width of its own."""
    import cv2

    height, width = covered.shape
    scale = min(height, width) / LAMA_SIDE
    for number in range(random.integers(chains.count[0], chains.count[1] + 1)):
        x, y = (int(random.integers(length)) for length in (width, height))
        for _ in range(random.integers(*LAMA_SEGMENTS)):
            angle = 0.01 + random.integers(LAMA_ANGLES)
            angle = 2 * np.pi - angle if number % 2 == 0 else angle
            length = scale * (LAMA_LENGTH + random.integers(chains.length))
            thickness = max(1, round(scale * (LAMA_WIDTH + random.integers(chains.width))))
            end_x = int(np.clip(x + length * np.sin(angle), 0, width))
            end_y = int(np.clip(y + length * np.cos(angle), 0, height))
            cv2.line(covered, (x, y), (end_x, end_y), 1, thickness)
            x, y = end_x, end_y


def _add_rectangles(covered: np.ndarray, rectangles: Rectangles, random: np.random.Generator) -> None:
    """Set the pixels of rectangles to 1."""
    scale = min(covered.shape) / LAMA_SIDE
    margin = round(scale * rectangles.margin)
    low = max(1, round(scale * rectangles.side[0]))
    for _ in range(random.integers(rectangles.count[0], rectangles.count[1] + 1)):
        parts = []
        for length in covered.shape:
            high = max(low + 1, min(round(scale * rectangles.side[1]), min(covered.shape) - 2 * margin))
            side = min(int(random.integers(low, high)), length)
            start = int(random.integers(min(margin, length - side), max(margin, length - margin - side) + 1))
            parts.append(slice(start, start + side))
        covered[tuple(parts)] = 1
