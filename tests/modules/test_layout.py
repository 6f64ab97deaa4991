"""Tests of the token encoding of layouts."""

from __future__ import annotations

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.encoders.layout import Box, LayoutTokens

PUBLISHED = LayoutTokens(8192)  # vocabulary of the published layout model, which takes 92 tokens


def test_encode_boxes():
    """Encode boxes at the corners of the 90 × 90 grid, the cells 0 and 89 of a row or column."""
    tokens = PUBLISHED.encode([Box(17, (0.0, 0.0, 1.0, 1.0)), Box(3, (1.0, 0.0, 1.0, 0.5))], 92)
    assert tokens.shape == (92,) and tokens.dtype == torch.int64
    assert tokens[:6].tolist() == [17, 0, 90 * 90 - 1, 3, 89, 44 * 90 + 89]
    assert (tokens[6:90] == 8191).all(), "no box"
    assert tokens[90:].tolist() == [0, 90 * 90 - 1], "the window is the whole layout"


def test_decoded_boxes_are_at_the_nearest_cell():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(30, 2, 2, generator=generator).sort(dim=1).values
    boxes = [Box(i, tuple(position)) for i, position in enumerate(corners.flatten(1).tolist())]
    decoded = PUBLISHED.decode(PUBLISHED.encode(boxes, 92))
    assert [box.label for box in decoded] == list(range(30))
    distances = [
        abs(a - b)
        for box, other in zip(boxes, decoded, strict=True)
        for a, b in zip(*map(list, (box.position, other.position)), strict=True)
    ]
    assert max(distances) <= 0.5 / 89 + 1e-9


def test_decoded_positions_are_relative_to_the_window():
    """Decode boxes with the right half as the window: its left edge is 0 and its right edge 1."""
    window = (44.5 / 89, 0.0, 1.0, 1.0)
    tokens = PUBLISHED.encode([Box(0, (66 / 89, 0.0, 1.0, 1.0)), Box(1, (0.0, 0.0, 1.0, 1.0))], 92, window)
    half, whole = (box.position for box in PUBLISHED.decode(tokens))
    assert half == pytest.approx((22 / 45, 0, 1, 1))
    assert whole == pytest.approx((-44 / 45, 0, 1, 1))


def test_encode_without_a_window():
    assert PUBLISHED.encode([], 9).tolist() == [8191] * 9
    assert PUBLISHED.decode(PUBLISHED.encode([Box(5, (0.0, 0.0, 1.0, 1.0))], 9)) == [Box(5, (0.0, 0.0, 1.0, 1.0))]
    assert PUBLISHED.decode(PUBLISHED.encode([Box(5, (0.0, 0.0, 1.0, 1.0))], 10)) == [Box(5, (0.0, 0.0, 1.0, 1.0))]


def test_decode_skips_invalid_corners():
    assert PUBLISHED.decode(torch.tensor([5, 0, 8100, 6, 0, 8099])) == [Box(6, (0.0, 0.0, 1.0, 1.0))]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([Box(0, (0, 0, 1, 1))] * 31, "31 boxes do not fit into 92 tokens; give at most 30"),
        ([Box(3, (0, 0, 1, 1))] * 31, r'92 tokens; give at most 30 \(too many: "3"\)'),
        ([Box(3, (0, 0, 1, 1), "Dog")] * 32, r'give at most 30 \(too many: "Dog", "Dog"\)'),
        ([Box(3, (0, 0, 1, 1), "Dog")] * 36, r'give at most 30 \(too many: "Dog", "Dog", "Dog", "Dog", …\)'),
        ([Box(8191, (0, 0, 1, 1))], "class 8191; classes go from 0 to 8190"),
        ([Box(-1, (0, 0, 1, 1))], "class -1"),
        ([Box(0, (0, 0, 1.5, 1))], r"positions must lie in \[0, 1\]"),
    ],
)
def test_invalid_boxes_raise_user_error(boxes, message):
    with pytest.raises(UserError, match=message):
        PUBLISHED.encode(boxes, 92)
