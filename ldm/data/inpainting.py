"""Pictures with parts to fill, to train in-painting on.

Shapes: images (H, W, 3) float32 in [-1, 1]; masks (H, W, 1) float32, 1 where the picture is to be filled, else -1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from ldm.config.instantiate import instantiate_from_config
from ldm.data.image_files import plain_entries

LARGEST_SHARE = 0.6  # of a picture that a mask covers
STROKES, BOXES = (1, 5), (1, 4)  # numbers of each, the second excluded
TURNS = (3, 9)  # corners of a stroke
WIDTH = (0.06, 0.2)  # of a stroke, as a share of the picture's smaller side
LENGTH = (0.1, 0.4)  # of a stroke between two corners
SIDE = (0.15, 0.55)  # of a box, as a share of the picture's


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` with black where `mask` is above 0."""
    return np.where(mask > 0, np.float32(-1.0), image)


def random_mask(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Strokes of a brush or boxes, (height, width, 1) float32: something, and at most `LARGEST_SHARE`, is 1."""
    while True:
        picture = Image.new("1", (width, height))
        draw = ImageDraw.Draw(picture)
        if random.random() < 0.5:
            for _ in range(random.integers(*STROKES)):
                _stroke(draw, height, width, random)
        else:
            for _ in range(random.integers(*BOXES)):
                _box(draw, height, width, random)
        covered = np.asarray(picture)
        if 0 < covered.mean() <= LARGEST_SHARE:
            return np.where(covered, np.float32(1.0), np.float32(-1.0))[..., None]


def _stroke(draw: ImageDraw.ImageDraw, height: int, width: int, random: np.random.Generator) -> None:
    side = min(height, width)
    thickness = max(1, round(side * random.uniform(*WIDTH)))
    at = random.uniform(0, (width, height))
    angle = random.uniform(0, 2 * np.pi)
    corners = [tuple(at)]
    for _ in range(random.integers(*TURNS)):
        angle += random.uniform(-1.5, 1.5)
        at = (at + side * random.uniform(*LENGTH) * np.array([np.cos(angle), np.sin(angle)])).clip(0, (width, height))
        corners.append(tuple(at))
    draw.line(corners, fill=1, width=thickness, joint="curve")
    for x, y in (corners[0], corners[-1]):
        draw.circle((x, y), thickness / 2, fill=1)


def _box(draw: ImageDraw.ImageDraw, height: int, width: int, random: np.random.Generator) -> None:
    w, h = (max(1, round(length * random.uniform(*SIDE))) for length in (width, height))
    left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
    draw.rectangle((left, top, left + w - 1, top + h - 1), fill=1)


class MaskedPictures(Dataset):
    """The items of another data set with a random mask each.

    Items are the other's `image` and its texts and numbers, `mask`, and `masked_image`, the picture with black in place
    of what is to be filled: what a model with the `cond_stage_key` `masked_image` trains on. Masks come from torch's
    global generator, or with `fixed` from the item's number.

    Args:
        dataset: `target` and `params` of the other data set.
        fixed: the same masks every time, for validation.
    """

    def __init__(self, dataset: Mapping[str, Any], fixed: bool = False) -> None:
        self.dataset = instantiate_from_config(dataset)
        self.fixed = fixed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = plain_entries(self.dataset[index])
        seed = index if self.fixed else int(torch.randint(2**31, ()))
        mask = random_mask(*item["image"].shape[:2], np.random.default_rng(seed))
        return {**item, "mask": mask, "masked_image": masked(item["image"], mask)}
