"""Published builders of layout tokens, and their helpers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.coco_stuff import LABELS
from ldm.data.layout_tokens import LayoutTokenBuilder
from ldm.errors import UserError
from taming.data.conditional_builder import utils
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.helper_types import Annotation
from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
    convert_pil_to_tensor,
)

PUBLISHED = (317, 30, 8192, True, True, True)
NONE, LAST = 8191, 90 * 90 - 1


def annotation(category_no=3, bbox=(0.0, 0.0, 0.5, 1.0), **attributes):
    """Return an annotation."""
    area = bbox[2] * bbox[3]
    return Annotation(area=area, image_id="a", bbox=bbox, category_no=category_no, category_id="c", **attributes)


def test_published_sizes():
    boxes, centres = ObjectsBoundingBoxConditionalBuilder(*PUBLISHED), ObjectsCenterPointsConditionalBuilder(*PUBLISHED)
    assert (boxes.embedding_dim, boxes.object_descriptor_length, boxes.no_sections, boxes.none) == (92, 3, 90, 8191)
    assert (centres.embedding_dim, centres.object_descriptor_length) == (62, 2)
    assert ObjectsBoundingBoxConditionalBuilder(317, 30, 8192, False, True, True).embedding_dim == 90


def test_coordinates_are_the_cells_of_a_grid():
    """Check the example of the published documentation: 16 tokens are a grid of 4 × 4 cells."""
    builder = ObjectsBoundingBoxConditionalBuilder(5, 3, 16, False, False, False)
    assert [builder.tokenize_coordinates(*point) for point in ((2 / 3, 1 / 3), (1, 1), (0, 0))] == [6, 15, 0]
    assert builder.coordinates_from_token(6) == pytest.approx((2 / 3, 1 / 3))
    assert builder.token_pair_from_bbox((0.0, 0.0, 2 / 3, 1 / 3)) == (0, 6)
    assert builder.bbox_from_token_pair(0, 6) == pytest.approx((0, 0, 2 / 3, 1 / 3))


def test_boxes_are_built_and_inverted():
    builder = ObjectsBoundingBoxConditionalBuilder(*PUBLISHED)
    objects = [annotation(3), annotation(5, (0.5, 0.5, 0.5, 0.5), is_group_of=True, is_occluded=True, is_inside=False)]
    tokens = builder.build(objects)
    assert tokens.shape == (92,) and tokens.dtype == torch.int64
    assert tokens[90:].tolist() == [0, LAST] and (tokens[6:90] == NONE).all()
    found, crop = builder.inverse_build(tokens)
    assert sorted(token for token, _ in found) == [3, 5 + 317 * 3] and crop == (0, 0, 1, 1)
    described = {builder.representation_to_annotation(token) for token, _ in found}
    assert {(each.category_no, each.is_group_of, each.is_occluded, each.is_depiction) for each in described} == {
        (3, False, False, False),
        (5, True, True, False),
    }
    box = dict(found)[3]
    assert box == pytest.approx((0, 0, 44 / 89, 1))


def test_tokens_are_those_of_the_builder_in_ldm():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((20, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
    labels, crop = rng.integers(0, 317, 20), (0.1, 0.0, 0.5, 0.75)
    objects = [annotation(int(label), tuple(box)) for label, box in zip(labels, boxes.tolist(), strict=True)]
    for encode_crop in (True, False):
        published = ObjectsBoundingBoxConditionalBuilder(317, 30, 8192, encode_crop, True, True, order="size")
        own = LayoutTokenBuilder(317, 30, 8192, encode_crop)
        for flip in (False, True):
            assert torch.equal(published.build(objects, crop, flip), own.encode(boxes, labels, crop, flip))


def test_order_is_random_and_the_given_list_stays():
    builder = ObjectsBoundingBoxConditionalBuilder(*PUBLISHED)
    objects = [annotation(i, (0.01 * i, 0.0, 0.1, 0.1)) for i in range(20)]
    before = list(objects)
    torch.manual_seed(0)
    first, second = (builder.build(objects)[:60:3].tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == list(range(20)) and objects == before


def test_too_many_objects_are_said_once(caplog):
    builder = ObjectsBoundingBoxConditionalBuilder(10, 2, 8192, True, False, False)
    for _ in range(2):
        assert builder.build([annotation(i) for i in range(3)]).shape == (8,)
    assert [record.getMessage() for record in caplog.records] == [
        "an image has 3 objects; 2 of them fit into the tokens"
    ]


def test_centre_points():
    builder = ObjectsCenterPointsConditionalBuilder(10, 2, 8192, True, False, False)
    tokens = builder.build([annotation(3, (0.2, 0.4, 0.4, 0.4))], (0.0, 0.0, 0.5, 1.0))
    cell = round(0.6 * 89) * 90 + round(0.4 * 89)
    assert tokens.tolist() == [3, cell, NONE, NONE, 0, 89 * 90 + 44]
    (found,), crop = builder.inverse_build(tokens)
    assert found == (3, pytest.approx((36 / 89, 53 / 89))) and crop == pytest.approx((0, 0, 44 / 89, 1))
    with pytest.raises(ValueError, match="a sequence has 6 tokens, not 5"):
        builder.inverse_build(tokens[:5])


@pytest.mark.parametrize("kind", [ObjectsBoundingBoxConditionalBuilder, ObjectsCenterPointsConditionalBuilder])
def test_plots(kind):
    builder = kind(10, 2, 8192, True, True, True)
    tokens = builder.build([annotation(3, (0.25, 0.25, 0.5, 0.5))], (0.0, 0.0, 0.75, 1.0))
    names = []
    plot = builder.plot(tokens, lambda number: names.append(number) or "dog", (64, 64), line_width=1)
    assert plot.shape == (3, 64, 64) and plot.min() >= -1 and plot.max() == 1 and names == [3]
    pixels = ((plot + 1) * 127.5).round().int().movedim(0, -1)
    colour = torch.tensor(utils.COLOR_PALETTE[0])
    marked = (pixels == colour).all(dim=-1).nonzero()
    corners = marked.min(dim=0).values.tolist(), marked.max(dim=0).values.tolist()
    assert corners == (([15, 15], [48, 47]) if kind is ObjectsBoundingBoxConditionalBuilder else ([29, 29], [33, 33]))
    crop = (pixels == torch.tensor(utils.GRAY_75)).all(dim=-1)
    assert crop[:, 48].sum() > 50 or crop[:, 47].sum() > 50


def test_helpers():
    assert utils.intersection_area((0, 0, 0.5, 0.5), (0.25, 0.25, 1, 1)) == 0.0625
    assert utils.horizontally_flip_bbox((0.1, 0.2, 0.3, 0.4)) == pytest.approx((0.6, 0.2, 0.3, 0.4))
    assert utils.absolute_bbox((0.1, 0.5, 0.5, 0.25), 100, 200) == (10, 100, 60, 150)
    assert utils.pad_list([1], 0, 3) == [1, 0, 0]
    inside, outside = annotation(bbox=(0.5, 0.5, 0.1, 0.1)), annotation(bbox=(0.0, 0.0, 0.1, 0.1))
    assert utils.filter_annotations([inside, outside], (0.4, 0.4, 0.5, 0.5)) == [inside]
    (scaled,) = utils.rescale_annotations([annotation(bbox=(0.0, 0.5, 0.5, 0.5))], (0.25, 0.0, 0.5, 1.0), False)
    assert scaled.bbox == (0.0, 0.5, 0.5, 0.5), "the part outside the crop is cut off"
    (mirrored,) = utils.rescale_annotations([annotation(bbox=(0.0, 0.5, 0.5, 0.5))], (0.25, 0.0, 0.5, 1.0), True)
    assert mirrored.bbox == (0.5, 0.5, 0.5, 0.5)
    assert [utils.get_plot_font_size(None, (side, 1)) for side in (255, 256, 512)] == [10, 12, 15]
    assert utils.get_plot_font_size(7, (512, 512)) == 7
    assert [utils.get_circle_size((1, side)) for side in (255, 256, 512)] == [2, 3, 4]
    both = annotation(is_group_of=True, is_inside=True)
    assert utils.additional_parameters_string(both) == "(g,i)" and utils.additional_parameters_string(inside) == ""
    assert utils.additional_parameters_string(both, short=False) == "(group,inside)"
    assert utils.load_object_from_string("ldm.data.coco_stuff.LABELS") is LABELS
    with pytest.raises(UserError, match=r'"os\.system" is refused'):
        utils.load_object_from_string("os.system")


@pytest.mark.parametrize("as_tensor", [False, True])
def test_crops_return_their_boxes(as_tensor):
    """Check that each crop returns the part of the image that its box describes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    given = convert_pil_to_tensor(image) if as_tensor else image
    torch.manual_seed(0)
    random.seed(0)
    boxes = set()
    for transform in [RandomCrop1dReturnCoordinates((20, 30)), Random2dCropReturnCoordinates(20)] * 5:
        (x, y, width, height), part = transform(given)
        left, top = round(x * 60), round(y * 40)
        expected = pixels[top : top + round(height * 40), left : left + round(width * 60)]
        part = part if as_tensor else convert_pil_to_tensor(part)
        assert np.array_equal(part.movedim(0, -1), expected)
        boxes.add((x, y, width, height))
    assert len(boxes) == 10
    box, part = CenterCropReturnCoordinates(40)(given)
    part = part if as_tensor else convert_pil_to_tensor(part)
    assert box == pytest.approx((1 / 6, 0, 2 / 3, 1)) and np.array_equal(part.movedim(0, -1), pixels[:, 10:50])
    assert Random2dCropReturnCoordinates(50)(given)[0][2:] == (2 / 3, 1), "a small image: the largest square"
    for p, expected in ((0.0, pixels), (1.0, pixels[:, ::-1])):
        flipped, part = RandomHorizontalFlipReturn(p)(given)
        part = part if as_tensor else convert_pil_to_tensor(part)
        assert flipped == (p == 1) and np.array_equal(part.movedim(0, -1), expected)
    with pytest.raises(ValueError, match="60 × 40 pixels has no crop of 50 × 50"):
        RandomCrop1dReturnCoordinates(50)(given)
