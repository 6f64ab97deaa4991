"""Tests of tiled processing: coverage of the map, exactness and seamless blending."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.tiles import fade, in_tiles, tile_starts


@pytest.mark.parametrize("size", [1, 5, 16, 17, 20, 31, 64, 100])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 4), (16, 15), (7, 3)])
def test_tiles_cover_the_map_and_overlap(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (5, 33)])
def test_pointwise_function_is_exact(size):
    x = torch.randn(2, 3, *size)
    expected = F.interpolate(x.square(), scale_factor=2)
    result = in_tiles(lambda tile: F.interpolate(tile.square(), scale_factor=2), x, tile=16, overlap=5, factor=2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_blend_has_no_seams():
    """Blend two tiles with different constants: the transition is linear, so each step is small."""
    level = iter([0.0, 1.0])
    result = in_tiles(lambda tile: torch.full_like(tile, next(level)), torch.zeros(1, 1, 16, 24), tile=16, overlap=8)
    row = result[0, 0, 0]
    assert row[0] == 0 and row[-1] == 1 and (row.diff() >= 0).all()
    assert row.diff().max() < 1.3 / 8


def test_fade_weights_rise_linearly_and_are_positive():
    torch.testing.assert_close(fade(8, 3), torch.tensor([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]))
    assert (fade(4, 0) == 1).all() and (fade(2, 5) > 0).all()
