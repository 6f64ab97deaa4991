"""Tests of `ldm.modules.lora`: low-rank updates of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldm.modules.lora import LoRA, factors, flat, merged
from ldm.modules.packing import packed_weights


class Network(nn.Module):
    """Two layers of each kind, in modules with the names of attention layers."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_out": nn.Sequential(nn.Linear(8, 4), nn.Dropout())})
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)

    def forward(self, x):
        h = self.attn["to_out"](self.attn["to_q"](x)).mT
        return self.conv(h.reshape(len(x), 4, 4, 4))


def network(**params):
    torch.manual_seed(0)
    net = Network().eval().requires_grad_(False)
    net.lora = LoRA(net, **params)
    return net


def randomise(lora):
    for parameter in lora.parameters():
        nn.init.normal_(parameter.data)


X = torch.arange(2 * 16 * 6).reshape(2, 16, 6) / 100


def test_new_updates_are_zero():
    plain = Network()
    net = network(targets=["to_q", "to_out.0", "conv"])
    plain.load_state_dict(net.state_dict(), strict=False)
    assert torch.equal(net(X), plain.eval()(X))
    assert set(net.lora.updates) == {"attn_to_q", "attn_to_out_0", "conv"}
    assert all(update.down.weight.any() for update in net.lora.updates.values())


def test_updates_equal_merged_weights():
    net = network(rank=3, alpha=1.5, targets=["to_q", "to_out.0", "conv"])
    randomise(net.lora)
    weights = merged(net.state_dict(), "lora.", "")
    plain = Network().eval()
    plain.load_state_dict(weights)
    assert set(weights) == set(plain.state_dict())
    q = net.lora.updates["attn_to_q"]
    expected = net.attn["to_q"].weight + 0.5 * (q.up.weight @ q.down.weight)
    torch.testing.assert_close(weights["attn.to_q.weight"], expected)
    torch.testing.assert_close(net(X), plain(X), rtol=1e-4, atol=1e-4)


def test_a_state_dict_without_updates_is_returned_as_it_is():
    weights = Network().state_dict()
    assert merged(weights, "lora.", "") is weights


def test_gradients_reach_the_factors_alone():
    net = network(targets=["to_q", "conv"])
    randomise(net.lora)
    net(X).square().sum().backward()
    assert {name for name, value in net.named_parameters() if value.grad is not None} == {
        name for name, _ in net.named_parameters() if name.startswith("lora.")
    }


def test_a_copy_has_updates_of_its_own():
    net = network(targets=["to_q"])
    other = copy.deepcopy(net)
    before = net(X)
    randomise(other.lora)
    assert torch.equal(net(X), before) and not torch.equal(other(X), before)


def test_updates_are_added_to_packed_layers():
    net = network(targets=["to_q", "conv"])
    randomise(net.lora)
    with torch.no_grad():
        expected = net(X)
        with packed_weights(net):
            torch.testing.assert_close(net(X), expected, rtol=1e-4, atol=1e-4)


def test_layers_in_half_precision_have_factors_in_float32():
    net = network(targets=["to_q"])
    randomise(net.lora)
    expected = net.attn["to_q"](X)
    net.attn["to_q"].to(torch.bfloat16)
    output = net.attn["to_q"](X.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16 and net.lora.updates["attn_to_q"].up.weight.dtype == torch.float32
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("targets", ["to_q", ["to_q"]])
def test_one_target_may_be_text(targets):
    assert set(network(targets=targets).lora.updates) == {"attn_to_q"}


def test_convolutions_in_groups_are_not_matched():
    with pytest.raises(Exception, match='LoRA: the target "grouped" matches no linear layer or 2-d convolution'):
        network(targets=["grouped"])


def test_factors_by_layer():
    net = network(rank=2, targets=["to_q"])
    ((layer, (down, up)),) = factors(net.lora.state_dict()).items()
    assert layer == flat("attn.to_q") and down.shape == (2, 6) and up.shape == (8, 2)
