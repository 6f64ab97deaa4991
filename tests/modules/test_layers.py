"""Tests of the layer helpers in ldm/modules/diffusionmodules/util.py."""

from __future__ import annotations

import math

import pytest
import torch
from parity_replay import assert_replayed
from torch import nn

from ldm.modules.diffusionmodules import schedule, util


def test_timestep_embedding_matches_the_recorded_values():
    assert_replayed("schedules", "timestep_embedding_33")


def test_timestep_embedding_follows_its_formula():
    embedding = util.timestep_embedding(torch.tensor([2.5, 40.0]), 6, max_period=100)
    for row, t in zip(embedding, (2.5, 40.0), strict=True):
        angles = [t * 100 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected))


def test_timestep_embedding_is_float32_for_every_dtype():
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        assert util.timestep_embedding(torch.arange(3).to(dtype), 8).dtype == torch.float32


def test_timestep_embedding_repeat_only():
    repeated = util.timestep_embedding(torch.tensor([7, 9]), 4, repeat_only=True)
    assert repeated.tolist() == [[7] * 4, [9] * 4]


def test_zero_and_scale_module_return_the_module():
    layer = nn.Linear(3, 2)
    nn.init.ones_(layer.weight)
    assert util.scale_module(layer, 0.5) is layer
    assert layer.weight.unique().tolist() == [0.5]
    assert util.zero_module(layer) is layer
    assert not any(p.any() for p in layer.parameters())
    assert layer.weight.requires_grad


def test_mean_flat_preserves_the_batch():
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert util.mean_flat(x).tolist() == [2.5, 8.5]


def test_normalization_has_32_groups_and_is_accurate_in_half_precision(seed):
    norm = util.normalization(64)
    x = 100 + torch.randn(2, 64, 9)
    expected = nn.functional.group_norm(x.bfloat16().float(), 32)
    actual = norm.bfloat16()(x.bfloat16())
    assert norm.num_groups == 32 and norm.eps == 1e-5
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_support_one_to_three_dimensions(dims):
    x = torch.randn(2, 4, *[6] * dims)
    assert util.conv_nd(dims, 4, 5, 3, padding=1)(x).shape == (2, 5, *[6] * dims)
    assert util.avg_pool_nd(dims, 2)(x).shape == (2, 4, *[3] * dims)


def test_other_dimensions_raise_value_error():
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3"):
        util.conv_nd(4, 1, 1, 1)


def test_checkpoint_recomputes_only_for_gradients():
    calls = []
    weight = nn.Parameter(torch.tensor(3.0))

    def square(x):
        calls.append(1)
        return weight * x**2

    x = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        util.checkpoint(square, (x,), [weight], True)
    assert len(calls) == 1
    util.checkpoint(square, (x,), [weight], False).backward()
    assert len(calls) == 2
    without = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    util.checkpoint(square, (x,), [weight], True).backward()
    assert len(calls) == 4
    assert (x.grad, weight.grad) == without == (12, 4)


def test_hybrid_conditioner_returns_both_conditionings():
    rescaler = {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": {}}
    embedder = {"target": "torch.nn.Embedding", "params": {"num_embeddings": 4, "embedding_dim": 8}}
    model = util.HybridConditioner(rescaler, embedder)
    condition = model(torch.zeros(1, 3, 8, 8), torch.tensor([[1, 2]]))
    assert condition["c_concat"][0].shape == (1, 3, 4, 4)
    assert condition["c_crossattn"][0].shape == (1, 2, 8)


def test_schedule_functions_are_available_under_their_published_names():
    names = ("make_beta_schedule", "make_ddim_timesteps", "make_ddim_sampling_parameters", "betas_for_alpha_bar")
    for name in (*names, "extract_into_tensor", "noise_like"):
        assert getattr(util, name) is getattr(schedule, name)
