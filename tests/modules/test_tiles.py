"""Tests of tiled processing: coverage of the map, exactness and seamless blending."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.tiles import TiledDenoiser, fade, in_tiles, tile_starts


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


def test_tiles_share_the_entries_of_a_conditioning_that_are_no_maps():
    seen = []

    class Model:
        def apply_model(self, x, t, cond):
            seen.append(cond)
            return x + cond["c_concat"][0].sum(dim=1, keepdim=True)

    x, maps = torch.randn(2, 1, 8, 12), torch.randn(2, 3, 8, 12)
    text, labels = torch.randn(2, 5, 4), torch.tensor([1, 2])
    cond = {"c_concat": [maps], "c_crossattn": [text], "c_adm": labels}
    result = TiledDenoiser(Model(), 8, 2).apply_model(x, torch.tensor([3, 3]), cond)
    torch.testing.assert_close(result, x + maps.sum(dim=1, keepdim=True))
    assert len(seen) == 2 and all(each["c_crossattn"][0] is text and each["c_adm"] is labels for each in seen)
    assert [each["c_concat"][0].shape for each in seen] == 2 * [(2, 3, 8, 8)]
