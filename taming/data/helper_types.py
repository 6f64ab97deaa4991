from typing import Any, Literal, NamedTuple

from PIL.Image import Image as PILImage
from torch import Tensor

__all__ = ["Annotation", "BoundingBox", "Category", "CropMethodType", "Image", "ImageDescription", "SplitType"]

Image = Tensor | PILImage
BoundingBox = tuple[float, float, float, float]  # left, top, width and height, as fractions of the image
CropMethodType = Literal["none", "center", "random-1d", "random-2d"]
SplitType = Literal["train", "validation", "test"]


class ImageDescription(NamedTuple):
    """Image of COCO; `original_size` is its width and height in pixels."""

    id: int
    file_name: str
    original_size: tuple[int, int]
    url: str | None = None
    license: int | None = None
    coco_url: str | None = None
    date_captured: str | None = None
    flickr_url: str | None = None
    flickr_id: str | None = None
    coco_id: str | None = None


class Category(NamedTuple):
    """Class of objects."""

    id: str
    super_category: str | None
    name: str


class Annotation(NamedTuple):
    """Labelled box in an image; `area` is that of the box, as a fraction of the image."""

    area: float | None
    image_id: str | None
    bbox: BoundingBox
    category_no: int
    category_id: str | None
    id: int | None = None
    source: str | None = None
    confidence: float | None = None
    is_group_of: bool | None = None
    is_truncated: bool | None = None
    is_occluded: bool | None = None
    is_depiction: bool | None = None
    is_inside: bool | None = None
    segmentation: dict[str, Any] | None = None
