"""Scenes of several emoji drawings on one background, with the conditioning of every task.

A *scene* is a background colour and a few drawings, each with a side and a position. A scene has a caption, a class,
boxes, a label map, a mask and a low-resolution version at once, so one data set serves every task.

Shapes: images (S, S, 3) float32 in [-1, 1]; boxes (x, y, width, height) as fractions of the side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.emoji import BACKGROUNDS, COLOURS, SIZES, Drawings, load_drawings, over, place, select_pairs
from ldm.data.image_files import to_image
from ldm.data.inpainting import masked, random_mask
from ldm.data.layout_tokens import LayoutTokenBuilder
from ldm.data.superresolution import find_degradation
from ldm.errors import UserError
from ldm.io.pixels import to_uint8

# Labels of the label maps: the eleven basic colour names. The first eight are the backgrounds, in their order.
LABEL_COLOURS: dict[str, tuple[int, int, int]] = {
    **BACKGROUNDS,
    "grey": (128, 128, 128),
    "brown": (120, 70, 35),
    "pink": (245, 155, 185),
}
LABELS = tuple(LABEL_COLOURS)

COUNT = (2, 5)  # drawings of a scene
SCALE = (0.32, 0.5)  # side of a drawing, as a fraction of the side of the scene
OVERLAP = 0.15  # largest part of the smaller of two drawings that the other one may cover
ATTEMPTS = 30  # positions that are tried before a drawing shrinks
SHRINKAGE = 0.9
MAX_BOXES = 30  # of the published layout tokens
LOW_RESOLUTION = "pil_bicubic"
SEED = 1  # of the validation scenes

BoxPosition = tuple[float, float, float, float]


@dataclass(frozen=True)
class Placement:
    """Drawing of a scene: its class, and the side and the centre of its square as fractions of the scene's side."""

    drawing: int
    scale: float
    x: float
    y: float

    @property
    def square(self) -> BoxPosition:
        """Box that contains the drawing with its transparent parts."""
        return self.x - self.scale / 2, self.y - self.scale / 2, self.scale, self.scale


@dataclass(frozen=True)
class Scene:
    """Drawings on a background colour; later drawings cover earlier ones."""

    background: str
    placements: tuple[Placement, ...]


def random_scene(
    random: np.random.Generator, drawings: Sequence[int], count: tuple[int, int], scale: tuple[float, float]
) -> Scene:
    """Sample a scene whose drawings hardly overlap.

    Args:
        random: the only source of randomness.
        drawings: classes to choose from; a scene contains a class once, unless there are fewer classes than drawings.
        count: smallest and largest number of drawings.
        scale: range of the side of a drawing; drawings that find no free position become smaller.
    """
    number = int(random.integers(count[0], count[1] + 1))
    chosen = random.choice(len(drawings), number, replace=number > len(drawings))
    background = COLOURS[random.integers(len(COLOURS))]
    placements: list[Placement] = []
    for position in chosen:
        side = random.uniform(*scale)
        while True:
            found = _free_position(random, placements, drawings[int(position)], side)
            if found is not None:
                placements.append(found)
                break
            side *= SHRINKAGE
    return Scene(background, tuple(placements))


def _free_position(
    random: np.random.Generator, placements: Sequence[Placement], drawing: int, side: float
) -> Placement | None:
    """Return a random position of a drawing that overlaps little with the other ones, or None if none was found."""
    for _ in range(ATTEMPTS):
        x, y = (float(value) for value in random.uniform(side / 2, 1 - side / 2, 2))
        candidate = Placement(drawing, float(side), x, y)
        if all(overlap(candidate.square, other.square) <= OVERLAP for other in placements):
            return candidate
    return None


def overlap(a: BoxPosition, b: BoxPosition) -> float:
    """Return the common area of two boxes as a fraction of the smaller one."""
    width, height = (min(a[axis] + a[axis + 2], b[axis] + b[axis + 2]) - max(a[axis], b[axis]) for axis in (0, 1))
    return max(width, 0.0) * max(height, 0.0) / min(a[2] * a[3], b[2] * b[3])


@dataclass(frozen=True)
class Rendering:
    """Image (S, S, 3) of a scene, and the box of the visible pixels of each drawing before others cover it."""

    image: np.ndarray
    boxes: tuple[BoxPosition, ...]


def render(scene: Scene, drawings: Drawings, size: int) -> Rendering:
    """Compose a scene on a canvas of `size` pixels."""
    canvas: np.ndarray = np.zeros((size, size, 4), np.float32)
    boxes = []
    for each in scene.placements:
        layer = place(drawings.rgba[each.drawing], each.scale, each.x - 0.5, each.y - 0.5, size)
        boxes.append(visible_box(layer))
        canvas = layer + canvas * (1 - layer[..., 3:] / 255)
    return Rendering(over(canvas, scene.background), tuple(boxes))


def visible_box(layer: np.ndarray) -> BoxPosition:
    """Return the box of the pixels of a layer (S, S, 4) that are at least half opaque."""
    rows, columns = (np.flatnonzero((layer[..., 3] >= 127.5).any(axis=axis)) for axis in (1, 0))
    if not len(rows):  # drawings of a few pixels can be transparent everywhere
        return 0.0, 0.0, 1.0, 1.0
    (left, right), (top, bottom) = ((int(found[0]), int(found[-1]) + 1) for found in (columns, rows))
    side = layer.shape[0]
    return left / side, top / side, (right - left) / side, (bottom - top) / side


def describe(scene: Scene, names: Sequence[str]) -> str:
    """Return a caption such as `"fox at the top left, rocket on the right, on a blue background"`.

    Args:
        scene: the scene.
        names: the name of each class.
    """
    parts = [f"{names[each.drawing]} {position_words(each.x, each.y)}" for each in scene.placements]
    return ", ".join([*parts, f"on a {scene.background} background"])


def position_words(x: float, y: float) -> str:
    """Return words for a position, which is one of nine parts of the scene."""
    column, row = (min(int(3 * value), 2) for value in (x, y))
    horizontal, vertical = ("left", "", "right")[column], ("top", "", "bottom")[row]
    if vertical:
        return f"at the {vertical} {horizontal}".rstrip()
    return f"on the {horizontal}" if horizontal else "in the middle"


def label_map(image: np.ndarray) -> np.ndarray:
    """Return the label of the nearest of `LABEL_COLOURS` at each pixel of an image (H, W, 3), as (H, W) int64."""
    known = np.array(list(LABEL_COLOURS.values()), np.float32) / 127.5 - 1
    distances = np.square(known).sum(axis=1) - 2 * image @ known.T  # without the square of the pixel, which is equal
    return distances.argmin(axis=-1)


class _Scenes(Dataset):
    """Base class of the data sets of scenes.

    Items: `image` (S, S, 3) float32 in [-1, 1]; `caption`; `class_label` and `human_label`, the number and the name of
    the background colour; `coordinates_bbox`, the layout tokens (92,) int64 with the drawings as classes;
    `segmentation` (S, S, 11), a label map of colours with one channel for each of `LABELS`; `mask` (S, S, 1), 1 in the
    masked part and -1 elsewhere; `masked_image`; and `LR_image` (S / downscale_f, …, 3).

    Args:
        size: side S of the scene in pixels.
        root: the data folder (default: `data/emoji`).
        names: use only these drawings, by Unicode or CLDR name.
        count: smallest and largest number of drawings.
        scale: range of the side of a drawing, as fractions of `size`.
        downscale_f: downscaling factor of `LR_image`.
        length: number of items.

    Raises:
        UserError: there is no data in `root`, a name is unknown, or a parameter is out of range.
    """

    def __init__(
        self,
        size: int = 64,
        root: str | Path | None = None,
        names: Sequence[str] | None = None,
        count: Sequence[int] = COUNT,
        scale: Sequence[float] = SCALE,
        downscale_f: int = 4,
        length: int = 8192,
    ) -> None:
        name = type(self).__name__
        if size < 1 or downscale_f < 1 or size % downscale_f:
            raise UserError(f"{name}: size must be a multiple of downscale_f ({downscale_f}), not {size}")
        if len(count) != 2 or not 1 <= count[0] <= count[1] <= MAX_BOXES:
            raise UserError(f"{name}: count must be two numbers from 1 to {MAX_BOXES}, the smaller first, not {count}")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"{name}: scale must be two numbers above 0 and up to 1, the smaller first, not {scale}")
        if length < 1:
            raise UserError(f"{name}: length must be at least 1, not {length}")
        self.size, self.length = size, length
        self.count, self.scale = (int(count[0]), int(count[1])), (float(scale[0]), float(scale[1]))
        self.drawings = load_drawings(_source_size(size * self.scale[1]), root)
        self.classes = sorted({index for index, _ in select_pairs(self.drawings, False, names)})
        self.layout_tokens = LayoutTokenBuilder(len(self.drawings), MAX_BOXES)
        self.degrade = find_degradation(LOW_RESOLUTION, size // downscale_f, downscale_f)

    def __len__(self) -> int:
        return self.length

    def _random(self, index: int) -> np.random.Generator:
        """Return the random generator of an item."""
        raise NotImplementedError

    def scene(self, index: int) -> Scene:
        """Return the scene of an item."""
        return self._scene(self._random(index))

    def _scene(self, random: np.random.Generator) -> Scene:
        return random_scene(random, self.classes, self.count, self.scale)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"there is no scene {index}; the data set has {self.length}")
        random = self._random(index)
        scene = self._scene(random)
        rendering = render(scene, self.drawings, self.size)
        image, mask = rendering.image, random_mask(self.size, self.size, random)
        return {
            "image": image,
            "caption": describe(scene, self.drawings.cldr_names),
            "class_label": COLOURS.index(scene.background),
            "human_label": scene.background,
            "coordinates_bbox": self.layout_tokens.encode(rendering.boxes, [each.drawing for each in scene.placements]),
            "segmentation": np.eye(len(LABELS), dtype=np.float32)[label_map(image)],
            "mask": mask,
            "masked_image": masked(image, mask),
            "LR_image": to_image(self.degrade(to_uint8(image))),
        }


class SceneTrain(_Scenes):
    """Training scenes: every access samples a new one from PyTorch's global generator, which a loader seeds."""

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng(int(torch.randint(2**31, ())))


class SceneValidation(_Scenes):
    """Validation scenes, which depend on their index only."""

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng((SEED, index))


def _source_size(side: float) -> int:
    """Return the smallest stored size of at least `side` pixels, or the largest stored size."""
    return next((stored for stored in SIZES if stored >= side), SIZES[-1])
