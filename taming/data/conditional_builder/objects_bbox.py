from collections.abc import Sequence
from typing import Any

from PIL import ImageDraw
from torch import Tensor

from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.conditional_builder.utils import (
    BLACK,
    COLOR_PALETTE,
    GRAY_75,
    WHITE,
    absolute_bbox,
    additional_parameters_string,
    get_plot_font_size,
    pad_list,
)
from taming.data.helper_types import Annotation, BoundingBox
from taming.data.image_transforms import convert_pil_to_tensor

__all__ = [
    "BLACK",
    "COLOR_PALETTE",
    "GRAY_75",
    "WHITE",
    "Annotation",
    "BoundingBox",
    "ObjectsBoundingBoxConditionalBuilder",
    "ObjectsCenterPointsConditionalBuilder",
    "absolute_bbox",
    "additional_parameters_string",
    "convert_pil_to_tensor",
    "get_plot_font_size",
    "pad_list",
]


class ObjectsBoundingBoxConditionalBuilder(ObjectsCenterPointsConditionalBuilder):
    """Builder of tokens of objects: three for each object, its class, its top-left and its bottom-right corner."""

    @property
    def object_descriptor_length(self) -> int:
        """Number of tokens of an object."""
        return 3

    def inverse_build(self, conditional: Tensor) -> tuple[list[Any], BoundingBox | None]:
        """Return (class token, box) of each object of a sequence, and the box of the crop."""
        objects, crop = self._split(conditional)
        return [(token, self.bbox_from_token_pair(*corners)) for token, *corners in objects], crop

    def _make_object_descriptors(self, annotations: Sequence[Annotation]) -> list[tuple[int, ...]]:
        descriptors = [
            (self.object_representation(each), *self.token_pair_from_bbox(each.bbox)) for each in annotations
        ]
        return pad_list(descriptors, (self.none,) * 3, self.no_max_objects)

    def _draw_object(
        self,
        draw: ImageDraw.ImageDraw,
        position: Any,
        label: str,
        colour: Any,
        figure_size: tuple[int, int],
        line_width: int,
        font: Any,
    ) -> None:
        box = absolute_bbox(position, *figure_size)
        draw.rectangle(box, outline=colour, width=line_width)
        draw.text((box[0] + line_width, box[1] + line_width), label, anchor="la", fill=BLACK, font=font)
