"""Tables of labelled boxes of many images, held in arrays: millions of boxes need no Python objects.

Boxes are (x, y, width, height) as fractions of the image in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ldm.data.faults import Faults

OUTSIDE_TOLERANCE = 0.01  # a box that extends further outside its image is not used


class Objects(NamedTuple):
    """Boxes of one image: positions (n, 4) float64, labels (n,), bits of attributes (n,), and numbers in the file."""

    boxes: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    ids: np.ndarray


@dataclass(frozen=True)
class BoxTable:
    """Boxes of many images, grouped by image.

    Attributes:
        images: (N,) names of the images.
        starts: (N + 1,) index of the first box of each image, and the number of boxes at the end.
        boxes: (M, 4) float64.
        labels: (M,) int32.
        attributes: (M,) uint8, the bits of `ldm.modules.encoders.layout.ATTRIBUTES`.
        ids: (M,) int64, number of each box in its file.
    """

    images: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Objects:
        part = slice(self.starts[index], self.starts[index + 1])
        return Objects(self.boxes[part], self.labels[part], self.attributes[part], self.ids[part])

    @classmethod
    def grouped(
        cls,
        images: np.ndarray | Sequence[str],
        image_of_box: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        attributes: np.ndarray,
        ids: np.ndarray,
    ) -> BoxTable:
        """Return a table of boxes in any order; `image_of_box` is the index of the image of each box.

        Images keep their order, and so do the boxes of an image.
        """
        counts = np.bincount(image_of_box, minlength=len(images))
        starts = np.concatenate([[0], np.cumsum(counts)])
        columns = [boxes.reshape(-1, 4), labels, attributes, ids]
        if (np.diff(image_of_box) < 0).any():
            order = np.argsort(image_of_box, kind="stable")
            columns = [column[order] for column in columns]
        return cls(np.asarray(images), starts, *columns)

    @property
    def counts(self) -> np.ndarray:
        """Number of boxes of each image (N,)."""
        return np.diff(self.starts)

    @property
    def areas(self) -> np.ndarray:
        """Area of each box (M,), as a fraction of its image."""
        return self.boxes[:, 2] * self.boxes[:, 3]

    def with_boxes(self, keep: np.ndarray) -> BoxTable:
        """Return the table with the boxes where `keep` (M,) is true; images without boxes stay."""
        before = np.concatenate([[0], np.cumsum(keep)])
        columns = (column[keep] for column in (self.boxes, self.labels, self.attributes, self.ids))
        return BoxTable(self.images, before[self.starts], *columns)

    def with_images(self, keep: np.ndarray) -> BoxTable:
        """Return the table with the images where `keep` (N,) is true."""
        boxes = self.with_boxes(np.repeat(keep, self.counts))
        starts = np.concatenate([[0], np.cumsum(self.counts[keep])])
        return replace(boxes, images=self.images[keep], starts=starts)

    def relabelled(self, numbers: np.ndarray) -> BoxTable:
        """Return the table with the label `numbers[label]` for each label; boxes of label -1 are left out."""
        table = replace(self, labels=numbers.astype(np.int32)[self.labels])
        return table.with_boxes(table.labels >= 0)

    def without_duplicates(self) -> BoxTable:
        """Return the table without boxes that repeat the label and the position of an earlier box of their image."""
        image = np.repeat(np.arange(len(self)), self.counts)
        columns = [image, self.labels, *self.boxes.T]
        order = np.argsort(_hashes(columns), kind="stable")
        same = np.ones(max(len(order) - 1, 0), bool)
        for column in columns:
            ordered = column[order]
            same &= ordered[1:] == ordered[:-1]
        keep = np.ones(len(order), bool)
        keep[order[1:]] = ~same
        return self.with_boxes(keep)

    def checked(self, faults: Faults, noun: str) -> BoxTable:
        """Return the table without boxes that are empty or outside their image; `faults` counts them.

        Boxes that extend outside by rounding are clipped.

        Args:
            faults: counter of the faults.
            noun: name of the numbers in `ids`, such as "row".
        """
        boxes, outside, empty = clipped(self.boxes)
        for mask, kind in ((outside, "boxes outside their image"), (empty, "empty boxes")):
            faults.add(kind, (f"{noun} {number}" for number in self.ids[mask][:3]), int(mask.sum()))
        table = replace(self, boxes=boxes)
        wrong = outside | empty
        return table.with_boxes(~wrong) if wrong.any() else table

    def with_counts(self, least: int, most: int) -> BoxTable:
        """Return the table with the images that have at least `least` and at most `most` boxes."""
        return self.with_images((self.counts >= least) & (self.counts <= most))


def _hashes(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return a hash (n,) uint64 of the rows of columns (n,); equal rows have equal hashes."""
    result = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        values = column.astype(np.float64).view(np.uint64)
        result = (result ^ values) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(29)
    return result


def clipped(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes (n, 4) clipped to their images, and masks (n,) of two kinds of boxes that cannot be used.

    Returns:
        The boxes; a mask of boxes far outside the image or with values that are not finite; a mask of empty boxes.
    """
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    low, high = -OUTSIDE_TOLERANCE, 1 + OUTSIDE_TOLERANCE
    outside = ~((first >= low) & (last <= high)).all(axis=1)
    result = boxes
    excess = ((first < 0) | (last > 1)).any(axis=1) & ~outside
    if excess.any():  # other boxes keep their exact values
        result = boxes.copy()
        inner, outer = first[excess].clip(0, 1), last[excess].clip(0, 1)
        result[excess] = np.concatenate([inner, outer - inner], axis=1)
    return result, outside, ~outside & ~(result[:, 2:] > 0).all(axis=1)
