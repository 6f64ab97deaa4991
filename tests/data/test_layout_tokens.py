"""Layout tokens of images: choice and order of boxes, crops, mirror images, attributes, decoding, plots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data.layout_tokens import LayoutTokenBuilder
from ldm.errors import UserError
from ldm.io.grids import draw_boxes
from ldm.modules.encoders.layout import Box, LayoutTokens
from ldm.pipelines.layout import LabelledBox, Layout, layout_tokens

NONE, LAST = 8191, 90 * 90 - 1
LEFT, RIGHT, SMALL = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 0.5, 1.0), (0.6, 0.1, 0.1, 0.1)


def cell(x: float, y: float) -> int:
    """Return the token of a corner."""
    return round(y * 89) * 90 + round(x * 89)


def test_sequence_has_92_tokens_of_boxes_and_crop():
    tokens = LayoutTokenBuilder(600).encode([LEFT], [17])
    assert tokens.shape == (92,) and tokens.dtype == torch.int64
    assert tokens[:3].tolist() == [17, 0, cell(0.5, 1)]
    assert (tokens[3:90] == NONE).all() and tokens[90:].tolist() == [0, LAST]


def test_tokens_equal_those_of_the_pipeline():
    """Encode random boxes in the order of their size as `ldm layout2img` does."""
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((30, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
    boxes = boxes[np.argsort(-boxes[:, 2] * boxes[:, 3])]
    labels = rng.integers(0, 600, 30)
    request = Layout(
        tuple(
            LabelledBox(int(label), (x, y, x + w, y + h))
            for label, (x, y, w, h) in zip(labels, boxes.tolist(), strict=True)
        )
    )
    assert torch.equal(LayoutTokenBuilder(600).encode(boxes, labels), layout_tokens(request, 8192, 92))


def test_boxes_are_ordered_by_the_size_of_their_part_in_the_crop():
    builder = LayoutTokenBuilder(10)
    assert builder.encode([SMALL, LEFT, RIGHT], [0, 1, 2])[:9:3].tolist() == [1, 2, 0], "equal sizes keep their order"
    crop = (0.4, 0.0, 0.6, 1.0)
    assert builder.encode([SMALL, LEFT, RIGHT], [0, 1, 2], crop)[:9:3].tolist() == [2, 1, 0]
    given = LayoutTokenBuilder(10, order="given")
    assert given.encode([SMALL, LEFT, RIGHT], [0, 1, 2])[:9:3].tolist() == [0, 1, 2]


def test_random_order_follows_the_generator_of_pytorch():
    builder, boxes = LayoutTokenBuilder(40, order="random"), [SMALL] * 20
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(builder.encode(boxes, range(20))[:60:3].tolist())
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(20))


def test_largest_boxes_are_kept_where_there_are_too_many():
    boxes = [(0.0, 0.0, 0.01 * (i + 1), 0.5) for i in range(40)]
    tokens = LayoutTokenBuilder(40).encode(boxes, range(40))
    assert tokens[:90:3].tolist() == list(range(39, 9, -1))


def test_boxes_outside_the_crop_are_left_out():
    tokens = LayoutTokenBuilder(10).encode([LEFT, RIGHT], [1, 2], crop=(0.5, 0.0, 0.5, 1.0))
    assert tokens[:4].tolist() == [2, cell(0.5, 0), LAST, NONE]
    assert tokens[90:].tolist() == [cell(0.5, 0), LAST], "the sequence ends with the crop"


def test_mirrored_boxes_and_crop():
    tokens = LayoutTokenBuilder(10).encode([SMALL], [3], crop=(0.6, 0.0, 0.4, 1.0), flip=True)
    assert tokens[:3].tolist() == [3, cell(0.3, 0.1), cell(0.4, 0.2)]
    assert tokens[90:].tolist() == [cell(0.0, 0.0), cell(0.4, 1.0)]


def test_without_the_crop_boxes_are_relative_to_it_and_clipped():
    builder = LayoutTokenBuilder(10, max_boxes=3, encode_crop=False)
    crop = (0.25, 0.0, 0.5, 1.0)
    tokens = builder.encode([(0.0, 0.0, 0.5, 1.0)], [3], crop)
    assert builder.length == len(tokens) == 9
    assert tokens.tolist() == [3, 0, cell(0.5, 1.0)] + [NONE] * 6
    assert builder.encode([(0.0, 0.0, 0.5, 1.0)], [3], crop, flip=True)[:3].tolist() == [3, cell(0.5, 0), LAST]


def test_decoded_boxes_are_those_that_were_encoded():
    rng = np.random.default_rng(1)
    corners = np.sort(rng.random((30, 2, 2)), axis=1)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
    labels, crop = rng.integers(0, 600, 30), (0.1, 0.2, 0.8, 0.7)
    builder = LayoutTokenBuilder(600)
    chosen = builder.select(boxes, labels, crop)
    found = builder.decode(builder.encode(boxes, labels, crop), relative_to_crop=False)
    assert found.labels.tolist() == chosen.labels.tolist() and len(found.labels) >= 20
    assert np.abs(found.boxes - chosen.boxes).max() <= 1 / 89 + 1e-9
    assert np.abs(np.array(found.crop) - crop).max() <= 1 / 89 + 1e-9
    x, y, width, height = found.crop
    relative = builder.decode(builder.encode(boxes, labels, crop))
    shifted = (found.boxes - [x, y, 0, 0]) / [width, height, width, height]
    assert relative.boxes == pytest.approx(shifted)


def test_attributes_are_part_of_the_class_token():
    builder = LayoutTokenBuilder(100, attributes=("group", "depiction"))
    tokens = builder.encode([LEFT, RIGHT], [7, 8], attributes=[0b0001, 0b0110])
    assert tokens[:6:3].tolist() == [7 + 100, 8 + 400], "the occlusion is not an attribute of this builder"
    found = builder.decode(tokens)
    assert found.labels.tolist() == [7, 8] and found.attributes.tolist() == [1, 4]
    names = builder.token_names([f"name{i}" for i in range(100)])
    assert (names[7], names[107], names[508]) == ("name7", "name7 (group)", "name8 (group, depiction)")
    assert LayoutTokenBuilder(100).encode([LEFT], [7], attributes=[15])[0] == 7


def test_plot_shows_the_boxes_with_their_names():
    builder = LayoutTokenBuilder(10)
    tokens = builder.encode([(0.0, 0.0, 0.5, 1.0)], [1])
    corners = [(0.0, 0.0, 44 / 89, 1.0)]
    assert torch.equal(builder.plot(tokens, (40, 40), ["cat", "dog"]), draw_boxes((40, 40), corners, ["dog"], 8))
    image = torch.full((40, 40, 3), -1.0)
    plot = builder.plot(tokens, (1, 1), [], image)
    assert torch.equal(plot, draw_boxes((40, 40), corners, ["1"], 8, np.zeros((40, 40, 3), np.uint8)))
    assert (plot[:, 35, 30] == -1).all(), "the image is the background"


def test_empty_layout():
    builder = LayoutTokenBuilder(10)
    tokens = builder.encode([], [])
    assert (tokens[:90] == NONE).all() and tokens[90:].tolist() == [0, LAST]
    assert builder.decode(tokens).boxes.shape == (0, 4)


def test_rounding_beyond_the_image_is_clipped():
    box = (0.1, 0.7, 0.9000000001, 0.3000000001)
    assert LayoutTokenBuilder(10).encode([box], [0])[2] == LAST


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayoutTokenBuilder(10).encode([LEFT], [10]), "class 10; classes go from 0 to 9"),
        (lambda: LayoutTokenBuilder(10).encode([LEFT], [-1]), "class -1"),
        (lambda: LayoutTokenBuilder(10).encode([(0.6, 0.0, 0.5, 1.0)], [1]), r"positions must lie in \[0, 1\]"),
        (lambda: LayoutTokenBuilder(8192), "8192 classes need 8192 tokens and one for no box, but there are 8192"),
        (lambda: LayoutTokenBuilder(5000, attributes=("group",)), "5000 classes with the attributes group need 10000"),
        (lambda: LayoutTokenBuilder(10, order="sise"), 'no order "sise" \\(did you mean "size"'),
        (lambda: LayoutTokenBuilder(10, attributes=("groups",)), 'no attribute "groups" \\(did you mean "group"'),
        (lambda: LayoutTokenBuilder(10).decode(torch.zeros(9)), "a layout has 92 tokens here"),
    ],
)
def test_invalid_values_raise_user_error_of_one_line(call, message):
    with pytest.raises(UserError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_window_argument_of_the_code():
    code = LayoutTokens(8192)
    tokens = code.encode([Box(1, (0.5, 0.0, 1.0, 1.0))], 92, (0.5, 0.0, 1.0, 1.0))
    assert code.window(tokens) == pytest.approx((44 / 89, 0, 1, 1))
    assert code.decode(tokens, (0.0, 0.0, 1.0, 1.0))[0].position == pytest.approx((44 / 89, 0, 1, 1))
