"""Fused optimizers take the same steps as plain ones, and load any state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from ldm.training.optimizers import fused

KINDS = [pytest.param(AdamW, {}, id="AdamW"), pytest.param(Adam, {"betas": (0.5, 0.9)}, id="Adam")]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(5 * 4 * 4, 7)).to(dtype)


def train(model, optimizer, steps, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6, dtype=next(model.parameters()).dtype)).square().sum().backward()
        optimizer.step()


def assert_same_weights(a, b):
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_steps_match_plain_optimizer(kind, options):
    plain, ours = network(), network()
    train(plain, kind(plain.parameters(), lr=0.01, foreach=False, **options), 5)
    optimizer = fused(kind, list(ours.parameters()), lr=0.01, **options)
    assert optimizer.param_groups[0]["fused"]
    train(ours, optimizer, 5)
    assert_same_weights(ours, plain)


@pytest.mark.parametrize("written_by", ["torch's plain optimizer", "an old torch", "a fused one"])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_optimizer_stays_fused_after_loading_any_state(kind, options, written_by):
    plain = network()
    writer = kind(plain.parameters(), lr=0.01, fused=written_by == "a fused one", **options)
    train(plain, writer, 3)
    state, ours = copy.deepcopy(writer.state_dict()), copy.deepcopy(plain)
    if written_by == "an old torch":  # steps were numbers, and groups had no entries about the implementation
        for group in state["param_groups"]:
            for name in ("fused", "foreach", "capturable", "differentiable", "maximize", "decoupled_weight_decay"):
                group.pop(name, None)
        for entry in state["state"].values():
            entry["step"] = int(entry["step"])
    optimizer = fused(kind, list(ours.parameters()), lr=0.5, **options)
    optimizer.load_state_dict(state)
    assert [group["fused"] for group in optimizer.param_groups] == [True]
    assert optimizer.param_groups[0]["lr"] == 0.01
    train(plain, writer, 3, seed=1)
    train(ours, optimizer, 3, seed=1)
    assert all(int(entry["step"]) == 6 for entry in optimizer.state.values())
    assert_same_weights(ours, plain)


def test_state_with_other_memory_layout_is_loaded():
    """The fused kernel of PyTorch silently reads the wrong elements of such a state."""
    plain = network()
    writer = Adam(plain.parameters(), lr=0.01, foreach=False)
    train(plain, writer, 3)
    state, ours = copy.deepcopy(writer.state_dict()), copy.deepcopy(plain)
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][0][name] = state["state"][0][name].contiguous()
        assert state["state"][0][name].stride() != ours[0].weight.stride()
    optimizer = fused(Adam, list(ours.parameters()), lr=0.01)
    optimizer.load_state_dict(state)
    train(plain, writer, 3, seed=1)
    train(ours, optimizer, 3, seed=1)
    assert_same_weights(ours, plain)


def test_state_of_another_model_raises_value_error():
    optimizer = fused(AdamW, list(network().parameters()))
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(AdamW(nn.Linear(2, 2).parameters()).state_dict())


def test_device_without_fused_kernel_uses_default_of_torch():
    parameters = list(nn.Linear(2, 2, device="meta").parameters())
    assert not fused(AdamW, parameters, lr=0.1).param_groups[0]["fused"]
