"""Tests of tiled encoding, decoding and denoising."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from parity_cases import assert_close, build, load_case
from parity_replay import SPLIT, assert_replayed

from ldm.errors import UserError
from ldm.models.diffusion.tiling import border_distance, tile_weights, tiled


def test_tiled_decoding_matches_record():
    assert_replayed("patchwise_decoding")


def test_tiled_denoising_matches_record():
    assert_replayed("patchwise_denoising")


def test_tiled_encoding_returns_one_posterior():
    model = build(load_case("text_to_image_pipeline"))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    whole = model.encode_first_stage(x)
    model.split_input_params = {**SPLIT, "ks": (32, 32), "stride": (32, 32)}
    assert_close(model.encode_first_stage(x).mode(), whole.mode(), 1e-5)  # a single tile
    model.split_input_params = {**SPLIT, "ks": (16, 16), "stride": (8, 8)}
    assert model.encode_first_stage(x).mode().shape == whole.mode().shape


@pytest.mark.parametrize("tie_braker", [False, True])
def test_pixelwise_function_is_exact(tie_braker):
    x, y = torch.randn(2, 3, 16, 24), torch.randn(2, 1, 16, 24)
    split = {**SPLIT, "tie_braker": tie_braker}
    assert_close(tiled(lambda a, b: a * 2 + b, [x, y], split), x * 2 + y, 1e-6)


def test_function_may_change_size():
    x = torch.randn(1, 2, 16, 16)
    up = torch.nn.Upsample(scale_factor=2)
    assert_close(tiled(up, [x], SPLIT, 2), up(x), 1e-6)
    halve = torch.nn.AvgPool2d(2)
    assert_close(tiled(halve, [x], SPLIT, Fraction(1, 2)), halve(x), 1e-6)


def test_small_map_is_one_tile():
    x, calls = torch.randn(1, 1, 6, 6), []
    tiled(lambda a: calls.append(a.shape) or a, [x], SPLIT)
    assert calls == [(1, 1, 6, 6)]


def test_tile_weights():
    assert border_distance(5, 3).tolist() == [[0, 0, 0], [0, 0.25, 0], [0, 0.5, 0], [0, 0.25, 0], [0, 0, 0]]
    weights = tile_weights((5, 3), (1, 2), {**SPLIT, "clip_max_weight": 0.3})
    assert weights.shape == (5, 3, 2)
    assert weights.amin() == pytest.approx(0.01)
    assert weights.amax() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": (4, 4)}, 'did you mean "stride"'),
        ({"ks": 8}, "ks must be two"),
        ({"stride": (0, 4)}, "stride must"),
    ],
)
def test_wrong_parameters_raise_user_error(change, message):
    model = build(load_case("patchwise_decoding"))
    with pytest.raises(UserError, match=message):
        model.split_input_params = {**SPLIT, **change}


def test_uncovered_map_raises_user_error():
    with pytest.raises(UserError, match="do not cover"):
        tiled(lambda a: a, [torch.zeros(1, 1, 18, 18)], SPLIT)
