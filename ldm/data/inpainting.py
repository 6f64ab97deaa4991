"""Images with masked parts, to train inpainting models.

Shapes: images (H, W, 3) float32 in [-1, 1]; masks (H, W, 1) float32, 1 in the masked part and -1 elsewhere.
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

MAX_COVERAGE = 0.6  # largest masked fraction of an image
STROKES, BOXES = (1, 5), (1, 4)  # number of strokes or boxes, without the upper bound
CORNERS = (3, 9)  # number of corners after the first of a stroke, without the upper bound
STROKE_WIDTH = (0.06, 0.2)  # as a fraction of the image's smaller side
STROKE_LENGTH = (0.1, 0.4)  # between two corners, as a fraction of the image's smaller side
BOX_SIDE = (0.15, 0.55)  # as a fraction of the image's side


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `image` with black in the masked part."""
    return np.where(mask > 0, np.float32(-1.0), image)


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


class MaskedPictures(Dataset):
    """Wrapper that adds a random mask to each item of a data set, for models with `cond_stage_key: masked_image`.

    Items: `image`, texts and numbers of the wrapped data set, `mask`, and `masked_image`, the image with black in the
    masked part. PyTorch's global generator determines the masks.

    Args:
        dataset: `target` and `params` of the wrapped data set.
        fixed: derive each mask from the index of the item instead, for validation.
    """

    def __init__(self, dataset: Mapping[str, Any], fixed: bool = False) -> None:
        self.dataset = instantiate_from_config(dataset)
        self.fixed = fixed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = plain_entries(self.dataset[index])
        seed = index if self.fixed else int(torch.randint(2**31, ()))
        height, width = item["image"].shape[:2]
        mask = random_mask(height, width, np.random.default_rng(seed))
        return {**item, "mask": mask, "masked_image": masked(item["image"], mask)}
