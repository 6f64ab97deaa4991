"""Layout tokens of images for training: from boxes, a crop and a mirror image to a sequence, and back.

`ldm.modules.encoders.layout.LayoutTokens` defines the code of a box. This module decides which boxes of an image a
sequence holds, in which order, and how a crop and a mirror image change them.

Boxes are (x, y, width, height) of the upper left corner and the size, as fractions of the whole image in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError, did_you_mean
from ldm.io.grids import draw_boxes
from ldm.io.pixels import to_uint8
from ldm.modules.encoders.layout import ATTRIBUTES, FULL_WINDOW, Box, LayoutTokens, attribute_names

FULL_CROP = (0.0, 0.0, 1.0, 1.0)
ORDERS = ("size", "random", "given")
Crop = Sequence[float]


class DecodedLayout(NamedTuple):
    """Boxes of a layout: (n, 4) float64, their classes (n,), the bits of their attributes (n,), and the crop."""

    boxes: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    crop: tuple[float, float, float, float]


class LayoutTokenBuilder:
    """Builder of layout tokens, such as the published sequences of 30 boxes and a crop: 92 tokens of 8192.

    Args:
        n_classes: number of classes.
        max_boxes: number of boxes in a sequence. Further boxes are left out; missing ones are tokens of "no box".
        vocab_size: number of tokens; the last one means "no box".
        encode_crop: end the sequence with the two corners of the crop, and keep boxes relative to the whole image.
            Otherwise boxes are relative to the crop and clipped to it.
        attributes: names of the attributes that class tokens include, see `ldm.modules.encoders.layout.ATTRIBUTES`.
        order: "size" (largest part inside the crop first), "random", or "given".

    Raises:
        UserError: the vocabulary is too small for the classes, or the order or an attribute is unknown.
    """

    def __init__(
        self,
        n_classes: int,
        max_boxes: int = 30,
        vocab_size: int = 8192,
        encode_crop: bool = True,
        attributes: Sequence[str] = (),
        order: str = "size",
    ) -> None:
        for kind, names, known in (("attribute", attributes, ATTRIBUTES), ("order", (order,), ORDERS)):
            for name in names:
                if name not in known:
                    raise UserError(
                        f'there is no {kind} "{name}"{did_you_mean(name, known)}; choose one of {", ".join(known)}'
                    )
        self.n_classes, self.max_boxes, self.encode_crop, self.order = n_classes, max_boxes, encode_crop, order
        self.attribute_mask = sum(1 << ATTRIBUTES.index(name) for name in set(attributes))
        self.tokens = LayoutTokens(vocab_size)
        needed = n_classes * (self.attribute_mask + 1)
        if needed > self.none:
            with_attributes = f" with the attributes {', '.join(attributes)}" if attributes else ""
            raise UserError(
                f"{n_classes} classes{with_attributes} need {needed} tokens and one for no box, but there are "
                f"{vocab_size}; choose fewer classes or attributes"
            )

    @property
    def none(self) -> int:
        """Token of "no box"."""
        return self.tokens.none

    @property
    def length(self) -> int:
        """Number of tokens of a sequence."""
        return 3 * self.max_boxes + 2 * self.encode_crop

    def encode(
        self,
        boxes: np.ndarray | Sequence[Sequence[float]],
        labels: np.ndarray | Sequence[int],
        crop: Crop | None = None,
        flip: bool = False,
        attributes: np.ndarray | Sequence[int] | None = None,
    ) -> Tensor:
        """Return the tokens (length,) int64 of the boxes of an image.

        Boxes without a part inside the crop are left out.

        Args:
            boxes: (n, 4), (x, y, width, height) of each box.
            labels: class of each box, from 0 to n_classes - 1.
            crop: box of the part of the image that is shown, before it is mirrored; None means all of it.
            flip: mirror boxes and crop from left to right.
            attributes: bits of the attributes of each box.

        Raises:
            UserError: a class is out of range, or a box extends outside the image.
        """
        layout = self.select(boxes, labels, crop, flip, attributes)
        coded = layout.labels + self.n_classes * layout.attributes
        objects = [Box(label, _corners(box)) for label, box in zip(coded.tolist(), layout.boxes.tolist(), strict=True)]
        return self.tokens.encode(objects, self.length, _corners(layout.crop))

    def select(
        self,
        boxes: np.ndarray | Sequence[Sequence[float]],
        labels: np.ndarray | Sequence[int],
        crop: Crop | None = None,
        flip: bool = False,
        attributes: np.ndarray | Sequence[int] | None = None,
    ) -> DecodedLayout:
        """Return the boxes that `encode` encodes, in their order, before they are rounded to the grid."""
        positions = np.asarray(boxes, np.float64).reshape(-1, 4)
        classes = np.asarray(labels, np.int64).reshape(-1)
        bits = np.zeros_like(classes) if attributes is None else np.asarray(attributes, np.int64).reshape(-1)
        for label in classes[(classes < 0) | (classes >= self.n_classes)][:1]:
            raise UserError(f"a box has the class {label}; classes go from 0 to {self.n_classes - 1}")
        view = np.asarray(FULL_CROP if crop is None else crop, np.float64)
        visible = intersection_areas(positions, view)
        order = self._order(visible)
        positions, classes, bits = positions[order], classes[order], bits[order] & self.attribute_mask
        if not self.encode_crop:
            positions = rescale(positions, view)
        if flip:
            positions, view = mirror(positions), mirror(view)
        return DecodedLayout(positions, classes, bits, tuple(view.tolist()))

    def _order(self, visible: np.ndarray) -> np.ndarray:
        """Return the indices of the boxes of a sequence; `visible` is the area of each box inside the crop."""
        if self.order == "size":
            order = np.argsort(-visible, kind="stable")
        elif self.order == "random":
            order = torch.randperm(len(visible)).numpy()
        else:
            order = np.arange(len(visible))
        return order[visible[order] > 0][: self.max_boxes]

    def decode(self, tokens: Tensor, relative_to_crop: bool = True) -> DecodedLayout:
        """Return the boxes of tokens (length,).

        Args:
            tokens: tokens of a layout.
            relative_to_crop: return boxes as fractions of the crop, of which they may exceed [0, 1]; otherwise of the
                whole image. A mirrored image stays mirrored.

        Raises:
            UserError: there is another number of tokens.
        """
        if tuple(tokens.shape) != (self.length,):
            raise UserError(f"a layout has {self.length} tokens here, not {tuple(tokens.shape)}")
        found = self.tokens.decode(tokens, None if relative_to_crop else FULL_WINDOW)
        coded = np.array([box.label for box in found], np.int64)
        corners = np.array([box.position for box in found], np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        left, top, right, bottom = self.tokens.window(tokens)
        crop = (left, top, right - left, bottom - top)
        return DecodedLayout(boxes, coded % self.n_classes, coded // self.n_classes, crop)

    def plot(
        self,
        tokens: Tensor,
        size: tuple[int, int],
        names: Sequence[str] = (),
        image: Tensor | np.ndarray | None = None,
    ) -> Tensor:
        """Draw the boxes of a layout with the names of their classes, as they lie in the crop.

        Args:
            tokens: tokens of a layout.
            size: width and height in pixels; with an image, its own size applies.
            names: names of the classes; numbers without them.
            image: image to draw on, (H, W, 3) in [-1, 1], or uint8; white by default.

        Returns:
            (3, H, W) float32 in [-1, 1].
        """
        layout = self.decode(tokens)
        background = None if image is None else _pixels(image)
        width, height = size if background is None else background.shape[1::-1]
        texts = [self.text(label, bits, names) for label, bits in zip(layout.labels, layout.attributes, strict=True)]
        corners = [_corners(box, clip=False) for box in layout.boxes.tolist()]
        return draw_boxes((width, height), corners, texts, max(height // 25, 8), background)

    def token_names(self, names: Sequence[str]) -> list[str]:
        """Return the name of each class token, such as "Dog" and "Dog (group)".

        Args:
            names: names of the classes.
        """
        count = self.n_classes * (self.attribute_mask + 1)
        return [self.text(token % self.n_classes, token // self.n_classes, names) for token in range(count)]

    @staticmethod
    def text(label: int, bits: int, names: Sequence[str] = ()) -> str:
        """Return the name of a class, or its number, with the attributes of the object in brackets."""
        name = names[label] if label < len(names) else str(label)
        attributes = attribute_names(int(bits))
        return f"{name} ({', '.join(attributes)})" if attributes else name


def object_attributes(groups: bool, others: bool) -> tuple[str, ...]:
    """Return the attributes of class tokens: groups, and the others of OpenImages."""
    return (ATTRIBUTES[:1] if groups else ()) + (ATTRIBUTES[1:] if others else ())


def intersection_areas(boxes: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Return the area (n,) that each of the boxes (n, 4) has inside another box (4,)."""
    first = np.maximum(boxes[:, :2], view[:2])
    last = np.minimum(boxes[:, :2] + boxes[:, 2:], view[:2] + view[2:])
    return np.maximum(last - first, 0).prod(axis=1)


def rescale(boxes: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Return boxes (n, 4) relative to another box (4,), clipped to it."""
    first = (boxes[:, :2] - view[:2]) / view[2:]
    last = (boxes[:, :2] + boxes[:, 2:] - view[:2]) / view[2:]
    first, last = first.clip(0, 1), last.clip(0, 1)
    return np.concatenate([first, last - first], axis=1)


def mirror(boxes: np.ndarray) -> np.ndarray:
    """Return boxes (..., 4) of an image that is mirrored from left to right."""
    x, y, width, height = np.moveaxis(boxes, -1, 0)
    return np.stack([1 - (x + width), y, width, height], axis=-1)


def _corners(box: Sequence[float], clip: bool = True) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a box, without the excess over [0, 1] that is only rounding."""
    x, y, width, height = box
    if not clip:
        return x, y, x + width, y + height
    return _within(x), _within(y), _within(x + width), _within(y + height)


def _within(value: float, tolerance: float = 1e-6) -> float:
    return min(max(value, 0.0), 1.0) if -tolerance <= value <= 1 + tolerance else value


def _pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) as uint8."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image
    return to_uint8(torch.as_tensor(image).movedim(-1, 0)[None])[0]
