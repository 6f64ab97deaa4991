import logging
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import LongTensor, Tensor

from ldm.data.layout_tokens import LayoutTokenBuilder, object_attributes
from taming.data.conditional_builder.utils import (
    ATTRIBUTE_FIELDS,
    BLACK,
    COLOR_PALETTE,
    FULL_CROP,
    GRAY_75,
    WHITE,
    absolute_bbox,
    additional_parameters_string,
    filter_annotations,
    get_circle_size,
    get_plot_font_size,
    horizontally_flip_bbox,
    pad_list,
    rescale_annotations,
)
from taming.data.helper_types import Annotation, BoundingBox
from taming.data.image_transforms import convert_pil_to_tensor

__all__ = [
    "BLACK",
    "COLOR_PALETTE",
    "FULL_CROP",
    "GRAY_75",
    "WHITE",
    "Annotation",
    "BoundingBox",
    "ObjectsCenterPointsConditionalBuilder",
    "absolute_bbox",
    "additional_parameters_string",
    "convert_pil_to_tensor",
    "filter_annotations",
    "get_circle_size",
    "get_plot_font_size",
    "horizontally_flip_bbox",
    "pad_list",
    "rescale_annotations",
]

logger = logging.getLogger(__name__)


class ObjectsCenterPointsConditionalBuilder:
    """Builder of tokens of objects: two for each object, its class and the cell of its centre.

    `ldm.data.layout_tokens.LayoutTokenBuilder` chooses the objects, and computes their boxes in a crop.

    Args:
        no_object_classes: number of classes.
        no_max_objects: number of objects in a sequence.
        no_tokens: size of the vocabulary; the last token means "no object".
        encode_crop: end the sequence with the corners of the crop.
        use_group_parameter: class tokens say whether a box holds a group of objects.
        use_additional_parameters: class tokens also say whether an object is occluded, a depiction, or shown from the
            inside.
        order: order of the objects in a sequence, "random" as published, "size" or "given".

    Raises:
        UserError: the vocabulary is too small for the classes.
    """

    def __init__(
        self,
        no_object_classes: int,
        no_max_objects: int,
        no_tokens: int,
        encode_crop: bool,
        use_group_parameter: bool,
        use_additional_parameters: bool,
        order: str = "random",
    ) -> None:
        attributes = object_attributes(use_group_parameter, use_additional_parameters)
        self.layout = LayoutTokenBuilder(no_object_classes, no_max_objects, no_tokens, encode_crop, attributes, order)
        self.no_object_classes = no_object_classes
        self.no_max_objects = no_max_objects
        self.no_tokens = no_tokens
        self.encode_crop = encode_crop
        self.no_sections = self.layout.tokens.side
        self.use_group_parameter = use_group_parameter
        self.use_additional_parameters = use_additional_parameters
        self._warned = False

    @property
    def none(self) -> int:
        """Token of "no object"."""
        return self.layout.none

    @property
    def object_descriptor_length(self) -> int:
        """Number of tokens of an object."""
        return 2

    @property
    def embedding_dim(self) -> int:
        """Number of tokens of a sequence."""
        return self.no_max_objects * self.object_descriptor_length + 2 * self.encode_crop

    def tokenize_coordinates(self, x: float, y: float) -> int:
        """Return the token of the cell at (x, y), both in [0, 1]: cells are counted row by row."""
        return self.layout.tokens.corner(x, y)

    def coordinates_from_token(self, token: int) -> tuple[float, float]:
        """Return the position (x, y) of the cell of a token."""
        return self.layout.tokens.coordinates(token)

    def bbox_from_token_pair(self, token1: int, token2: int) -> BoundingBox:
        """Return the box between the cells of two tokens."""
        x0, y0 = self.coordinates_from_token(token1)
        x1, y1 = self.coordinates_from_token(token2)
        return x0, y0, x1 - x0, y1 - y0

    def token_pair_from_bbox(self, bbox: BoundingBox) -> tuple[int, int]:
        """Return the tokens of the top-left and the bottom-right corner of a box."""
        x, y, width, height = bbox
        return self.tokenize_coordinates(x, y), self.tokenize_coordinates(x + width, y + height)

    def object_representation(self, annotation: Annotation) -> int:
        """Return the class token of an object, which includes its attributes."""
        return annotation.category_no + self.no_object_classes * (_bits(annotation) & self.layout.attribute_mask)

    def representation_to_annotation(self, representation: int) -> Annotation:
        """Return an annotation with the class and the attributes of a class token."""
        bits = representation // self.no_object_classes & self.layout.attribute_mask
        return _annotation(FULL_CROP, representation % self.no_object_classes, bits)

    def build(
        self,
        annotations: Sequence[Annotation],
        crop_coordinates: BoundingBox | None = None,
        horizontal_flip: bool | None = False,
    ) -> LongTensor:
        """Return the tokens (embedding_dim,) int64 of the objects in a crop.

        Args:
            annotations: objects with boxes (left, top, width, height) in [0, 1].
            crop_coordinates: box of the crop; None means the whole image.
            horizontal_flip: mirror the objects and the crop from left to right.
        """
        if len(annotations) > self.no_max_objects and not self._warned:
            self._warned = True
            logger.warning(
                "an image has %d objects; %d of them fit into the tokens", len(annotations), self.no_max_objects
            )
        chosen = self.layout.select(
            np.array([each.bbox for each in annotations], np.float64).reshape(-1, 4),
            [each.category_no for each in annotations],
            crop_coordinates,
            bool(horizontal_flip),
            [_bits(each) for each in annotations],
        )
        objects = [
            _annotation((x, y, width, height), label, bits)
            for (x, y, width, height), label, bits in zip(
                chosen.boxes.tolist(), chosen.labels.tolist(), chosen.attributes.tolist(), strict=True
            )
        ]
        ending = self._crop_encoder(chosen.crop) if self.encode_crop else []
        tokens = [token for descriptor in self._make_object_descriptors(objects) for token in descriptor]
        return torch.tensor([*tokens, *ending], dtype=torch.int64)  # type: ignore[return-value]

    def inverse_build(self, conditional: Tensor) -> tuple[list[Any], BoundingBox | None]:
        """Return (class token, centre) of each object of a sequence, and the box of the crop."""
        objects, crop = self._split(conditional)
        return [(token, self.coordinates_from_token(centre)) for token, centre in objects], crop

    def plot(
        self,
        conditional: Tensor,
        label_for_category_no: Callable[[int], str],
        figure_size: tuple[int, int],
        line_width: int = 3,
        font_size: int | None = None,
    ) -> Tensor:
        """Return a plot (3, H, W) in [-1, 1] of the objects of a sequence, with the crop as a rectangle.

        Args:
            conditional: tokens of the sequence.
            label_for_category_no: function from the number of a class to its name.
            figure_size: width and height in pixels.
            line_width: width of lines in pixels.
            font_size: size of the font in pixels.
        """
        image = Image.new("RGB", figure_size, WHITE)
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(get_plot_font_size(font_size, figure_size))
        objects, crop = self.inverse_build(conditional)
        for (token, position), colour in zip(objects, cycle(COLOR_PALETTE), strict=False):
            annotation = self.representation_to_annotation(token)
            label = f"{label_for_category_no(annotation.category_no)} {additional_parameters_string(annotation)}"
            self._draw_object(draw, position, label, colour, figure_size, line_width, font)
        if crop is not None:
            draw.rectangle(absolute_bbox(crop, *figure_size), outline=GRAY_75, width=line_width)
        return convert_pil_to_tensor(image) / 127.5 - 1.0

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
        x, y = position[0] * figure_size[0], position[1] * figure_size[1]
        radius = get_circle_size(figure_size)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, width=0)
        draw.text((x, y), label, anchor="md", fill=BLACK, font=font)

    def _crop_encoder(self, crop_coordinates: BoundingBox) -> list[int]:
        return list(self.token_pair_from_bbox(crop_coordinates))

    def _make_object_descriptors(self, annotations: Sequence[Annotation]) -> list[tuple[int, ...]]:
        """Return the tokens of each object, and those of "no object" up to the number of objects."""
        descriptors = [
            (
                self.object_representation(each),
                self.tokenize_coordinates(each.bbox[0] + each.bbox[2] / 2, each.bbox[1] + each.bbox[3] / 2),
            )
            for each in annotations
        ]
        return pad_list(descriptors, (self.none,) * 2, self.no_max_objects)

    def _split(self, conditional: Tensor) -> tuple[list[list[int]], BoundingBox | None]:
        """Return the tokens of each object of a sequence, and the box of the crop."""
        tokens = conditional.tolist()
        if len(tokens) != self.embedding_dim:
            raise ValueError(f"a sequence has {self.embedding_dim} tokens, not {len(tokens)}")
        length = self.object_descriptor_length
        groups = [tokens[start : start + length] for start in range(0, self.no_max_objects * length, length)]
        crop = self.bbox_from_token_pair(*tokens[-2:]) if self.encode_crop else None
        return [group for group in groups if group[0] != self.none], crop


def _bits(annotation: Annotation) -> int:
    return sum(1 << bit for bit, field in enumerate(ATTRIBUTE_FIELDS) if getattr(annotation, field) is True)


def _annotation(bbox: BoundingBox, category_no: int, bits: int) -> Annotation:
    attributes: Any = {field: bool(bits >> bit & 1) for bit, field in enumerate(ATTRIBUTE_FIELDS)}
    return Annotation(None, None, bbox, category_no, None, **attributes)
