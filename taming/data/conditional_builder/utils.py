from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ImageColor

from ldm.data.layout_tokens import FULL_CROP, intersection_areas, mirror, rescale
from ldm.data.object_classes import named_object
from ldm.io.grids import BOX_COLOURS
from ldm.modules.encoders.layout import ATTRIBUTES
from taming.data.helper_types import Annotation, BoundingBox

__all__ = [
    "BLACK",
    "COLOR_PALETTE",
    "FULL_CROP",
    "GRAY_25",
    "GRAY_50",
    "GRAY_75",
    "WHITE",
    "absolute_bbox",
    "additional_parameters_string",
    "filter_annotations",
    "get_circle_size",
    "get_plot_font_size",
    "horizontally_flip_bbox",
    "intersection_area",
    "load_object_from_string",
    "pad_list",
    "rescale_annotations",
]

COLOR_PALETTE = [ImageColor.getrgb(name) for name in BOX_COLOURS]
BLACK = (0, 0, 0)
GRAY_75 = (63, 63, 63)
GRAY_50 = (127, 127, 127)
GRAY_25 = (191, 191, 191)
WHITE = (255, 255, 255)
# Attributes of an annotation in the order of their bits.
ATTRIBUTE_FIELDS = ("is_group_of", "is_occluded", "is_depiction", "is_inside")


def intersection_area(rectangle1: BoundingBox, rectangle2: BoundingBox) -> float:
    """Return the common area of two boxes (left, top, width, height)."""
    return float(intersection_areas(np.array([rectangle1], np.float64), np.array(rectangle2, np.float64))[0])


def horizontally_flip_bbox(bbox: BoundingBox) -> BoundingBox:
    """Return a box of an image that is mirrored from left to right."""
    return _as_box(mirror(np.array(bbox, np.float64)))


def absolute_bbox(relative_bbox: BoundingBox, width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in pixels of a box (left, top, width, height) in [0, 1]."""
    x, y, w, h = relative_bbox
    return int(x * width), int(y * height), int((x + w) * width), int((y + h) * height)


def pad_list(list_: list[Any], pad_element: Any, pad_to_length: int) -> list[Any]:
    """Return a list with copies of `pad_element` at its end, up to a length."""
    return list_ + [pad_element] * (pad_to_length - len(list_))


def rescale_annotations(
    annotations: Sequence[Annotation], crop_coordinates: BoundingBox, flip: bool
) -> list[Annotation]:
    """Return annotations relative to a crop and clipped to it, mirrored from left to right with `flip`."""
    boxes = np.array([each.bbox for each in annotations], np.float64).reshape(-1, 4)
    boxes = rescale(boxes, np.array(crop_coordinates, np.float64))
    boxes = mirror(boxes) if flip else boxes
    return [each._replace(bbox=_as_box(box)) for each, box in zip(annotations, boxes, strict=True)]


def filter_annotations(annotations: Sequence[Annotation], crop_coordinates: BoundingBox) -> list[Annotation]:
    """Return the annotations with a part inside a crop."""
    return [each for each in annotations if intersection_area(each.bbox, crop_coordinates) > 0]


def additional_parameters_string(annotation: Annotation, short: bool = True) -> str:
    """Return the attributes of an annotation in brackets, by their first letters if `short`; "" without any."""
    names = [name for name, field in zip(ATTRIBUTES, ATTRIBUTE_FIELDS, strict=True) if getattr(annotation, field)]
    return f"({','.join(name[0] if short else name for name in names)})" if names else ""


def get_plot_font_size(font_size: int | None, figure_size: tuple[int, int]) -> int:
    """Return the size of the font in a plot: `font_size`, or one that suits the plot."""
    return font_size if font_size is not None else _by_size(figure_size, 10, 12, 15)


def get_circle_size(figure_size: tuple[int, int]) -> int:
    """Return the radius of the circles in a plot."""
    return _by_size(figure_size, 2, 3, 4)


def load_object_from_string(object_string: str) -> Any:
    """Return the object at a dotted path of an allowed package, such as a list of classes.

    Raises:
        UserError: the path is refused, or nothing is there.
    """
    return named_object(object_string)


def _by_size(figure_size: tuple[int, int], small: int, medium: int, large: int) -> int:
    side = max(figure_size)
    return large if side >= 512 else medium if side >= 256 else small


def _as_box(values: np.ndarray) -> BoundingBox:
    x, y, width, height = values.tolist()
    return x, y, width, height
