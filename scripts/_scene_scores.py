"""Scores of sampled emoji scenes: content of boxes, colours of label maps, backgrounds, and statistics of colours.

Shapes: N images (N, S, S, 3) float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from evaluate_emoji import border_colour
from PIL import Image

from ldm.data.emoji import BACKGROUNDS, Drawings, premultiply
from ldm.data.emoji_neighbours import CELLS
from ldm.data.emoji_scenes import LABELS, BoxPosition, visible_box
from ldm.data.layout_tokens import DecodedLayout

WHOLE = (0.0, 0.0, 1.0, 1.0)
STATISTICS_CELLS = 4  # the Fréchet distance compares mean colours of 4 × 4 cells


def nearest_backgrounds(images: np.ndarray) -> np.ndarray:
    """Return the index (N,) of the background colour that is nearest to the colour at the edges of each image."""
    known = np.array(list(BACKGROUNDS.values())) / 127.5 - 1
    return np.linalg.norm(border_colour(images)[:, None] - known, axis=-1).argmin(axis=1)


class BoxContents:
    """Recognition of the drawing in a box: the nearest one, stretched to the box, on the background of the image.

    Images and drawings are compared as `CELLS` × `CELLS` mean colours.

    Args:
        drawings: all drawings.
        classes: the drawings to choose from.
        with_margins: stretch the whole square of a drawing, not its visible part.
    """

    def __init__(self, drawings: Drawings, classes: Sequence[int], with_margins: bool = False) -> None:
        self.classes = np.array(classes)
        self.cells = np.stack([_cells_of_drawing(drawings.rgba[index], with_margins) for index in classes])

    def nearest(self, image: np.ndarray, box: BoxPosition, background: np.ndarray) -> int:
        """Return the class of the drawing that is nearest to the content of a box of an image (S, S, 3)."""
        content = np.stack([_box_cells(channel, box) for channel in np.moveaxis(image, -1, 0)], axis=-1)
        colours, opacity = self.cells[..., :3], self.cells[..., 3:]
        known = colours + (1 - opacity) * background
        return int(self.classes[np.square(known - content).sum(axis=(1, 2, 3)).argmin()])


def share_of_boxes(images: np.ndarray, layouts: Sequence[DecodedLayout], contents: BoxContents) -> float:
    """Return the percentage of boxes whose content is nearest to the drawing that the layout of the image names."""
    found = [
        contents.nearest(image, tuple(box), background) == label
        for image, background, layout in zip(images, border_colour(images), layouts, strict=True)
        for box, label in zip(layout.boxes.tolist(), layout.labels, strict=True)
    ]
    return 100 * float(np.mean(found))


def share_of_neighbours(images: np.ndarray, drawings: Drawings, neighbours: np.ndarray) -> float:
    """Return the percentage of images whose nearest drawing of all is one of their neighbours (N, k)."""
    contents = BoxContents(drawings, range(len(drawings)), with_margins=True)
    items = zip(images, border_colour(images), neighbours, strict=True)
    return 100 * float(np.mean([contents.nearest(image, WHOLE, colour) in found for image, colour, found in items]))


def _cells_of_drawing(rgba: np.ndarray, with_margins: bool) -> np.ndarray:
    """Return the mean colours in [-1, 1], weighted by opacity, and opacities of cells, (CELLS, CELLS, 4)."""
    pixels = premultiply(rgba) / 255
    pixels[..., :3] = 2 * pixels[..., :3] - pixels[..., 3:]
    box = WHOLE if with_margins else visible_box(rgba)
    return np.stack([_box_cells(channel, box) for channel in np.moveaxis(pixels, -1, 0)], axis=-1)


def _box_cells(channel: np.ndarray, box: BoxPosition) -> np.ndarray:
    """Return the means (CELLS, CELLS) of the cells of a box of a channel (S, S)."""
    side = channel.shape[0]
    x, y, width, height = (side * value for value in box)
    image = Image.fromarray(np.ascontiguousarray(channel, np.float32))
    resized = image.resize((CELLS, CELLS), Image.Resampling.BOX, (x, y, x + width, y + height))
    return np.asarray(resized)


def mean_iou(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the mean over labels of intersection over union, of two label maps (N, S, S).

    Pixels of all maps count together. Labels that no expected map contains do not count.
    """
    scores = []
    for label in range(len(LABELS)):
        wanted, found = expected == label, predicted == label
        if wanted.any():
            scores.append((wanted & found).sum() / (wanted | found).sum())
    return float(np.mean(scores))


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance between two sets of images, each a Gaussian of the mean colours of 4 × 4 cells."""
    (mean_a, covariance_a), (mean_b, covariance_b) = _statistics(a), _statistics(b)
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real.clip(0)
    distance = np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b)
    return float(distance - 2 * np.sqrt(eigenvalues).sum())


def _statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, side = images.shape[:2]
    cell = side // STATISTICS_CELLS
    grid = images.reshape(count, STATISTICS_CELLS, cell, STATISTICS_CELLS, cell, 3).mean(axis=(2, 4))
    features = grid.reshape(count, -1).astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)
