"""Tests of the exponential moving average of weights."""

from __future__ import annotations

import pytest
import torch
from parity_replay import assert_replayed
from torch import nn

from ldm.errors import UserError
from ldm.modules.attention import CrossAttention, cached_contexts
from ldm.modules.ema import LitEma


def test_updates_match_the_recorded_values():
    assert_replayed("ema")


def test_decay_is_constant_without_warm_up():
    linear = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(linear.weight)
    ema = LitEma(linear, decay=0.75, use_num_upates=False)
    nn.init.ones_(linear.weight)
    ema(linear)
    ema(linear)
    assert ema.weight.item() == pytest.approx(1 - 0.75**2)
    assert int(ema.num_updates) == -1


def test_buffer_names_have_no_dots_and_frozen_parameters_are_excluded():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    assert set(LitEma(model).state_dict()) == {"decay", "num_updates", "0weight", "0bias"}


def test_swapped_copies_nothing_and_restores_after_an_error():
    model = nn.Linear(2, 2)
    ema = LitEma(model)
    with torch.no_grad():
        ema.weight.fill_(3.0)
    before, address = model.weight.detach().clone(), ema.weight.data_ptr()
    with pytest.raises(RuntimeError), ema.swapped(model):
        assert model.weight.data_ptr() == address
        assert (model.weight == 3).all()
        raise RuntimeError
    assert torch.equal(model.weight, before)
    assert (ema.weight == 3).all()


def test_weights_with_cached_contexts_are_not_swapped():
    model = CrossAttention(4, 4, heads=1, dim_head=4)
    ema, weight = LitEma(model), model.to_k.weight.data_ptr()
    with cached_contexts(model), pytest.raises(UserError, match="prepared for sampling"), ema.swapped(model):
        pass
    with ema.swapped(model), cached_contexts(model):
        assert model.to_k.weight.data_ptr() != weight
    assert model.to_k.weight.data_ptr() == weight


def test_store_copy_and_restore():
    model = nn.Linear(2, 2)
    ema = LitEma(model)
    with torch.no_grad():
        ema.weight.fill_(3.0)
    before = model.weight.detach().clone()
    ema.store(model.parameters())
    ema.copy_to(model)
    assert (model.weight == 3).all()
    ema.restore(model.parameters())
    assert torch.equal(model.weight, before)


def test_restart_resets_averages_and_update_count():
    model = nn.Linear(2, 2)
    ema = LitEma(model)
    ema(model)
    nn.init.ones_(model.weight)
    ema.restart(model)
    assert (ema.weight == 1).all()
    assert int(ema.num_updates) == 0


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_decay_outside_its_range_raises_value_error(decay):
    with pytest.raises(ValueError, match="decay"):
        LitEma(nn.Linear(1, 1), decay=decay)
