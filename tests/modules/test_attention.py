"""Attention layers against closed forms and torch's own multi-head attention."""

from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.functional import gelu

from ldm.errors import UserError
from ldm.modules.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    LinearAttention,
    SpatialSelfAttention,
    SpatialTransformer,
    cached_contexts,
)
from ldm.modules.diffusionmodules.unet_blocks import AttentionBlock, QKVAttention, QKVAttentionLegacy

pytestmark = pytest.mark.usefixtures("seed")


def naive_attention(q, k, v):
    """Softmax attention of (N, d) matrices, written out."""
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


@torch.no_grad()
def randomise(module):
    for parameter in module.parameters():
        parameter.normal_(std=0.2)
    return module


def torch_attention(layer, dim, context_dim):
    """torch.nn.MultiheadAttention with the weights of `layer`."""
    twin = nn.MultiheadAttention(dim, layer.heads, kdim=context_dim, vdim=context_dim, batch_first=True)
    with torch.no_grad():
        twin.in_proj_bias.zero_()
        twin.q_proj_weight.copy_(layer.to_q.weight)
        twin.k_proj_weight.copy_(layer.to_k.weight)
        twin.v_proj_weight.copy_(layer.to_v.weight)
        twin.out_proj.load_state_dict(layer.to_out[0].state_dict())
    return twin


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_equals_torchs(masked):
    layer = CrossAttention(query_dim=24, context_dim=10, heads=3, dim_head=8)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    mask = torch.rand(2, 7) < 0.6 if masked else None
    expected, _ = torch_attention(layer, 24, 10)(x, context, context, key_padding_mask=~mask if masked else None)
    torch.testing.assert_close(layer(x, context, mask), expected)


def test_without_context_attention_is_to_itself():
    layer = CrossAttention(query_dim=16, heads=2, dim_head=4)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), layer(x, x))


def test_attention_has_no_bias_but_at_its_output():
    names = set(CrossAttention(16, 8).state_dict())
    assert names == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}


def test_geglu_gates_the_first_half_by_the_gelu_of_the_second():
    layer = GEGLU(4, 6)
    x = torch.randn(3, 4)
    values, gates = layer.proj(x)[:, :6], layer.proj(x)[:, 6:]
    torch.testing.assert_close(layer(x), values * gelu(gates))


def test_feed_forward_comes_with_and_without_gate():
    assert isinstance(FeedForward(8, glu=True).net[0], GEGLU)
    plain = FeedForward(8, dim_out=3, mult=2)
    assert plain.net[0][0].out_features == 16
    assert plain(torch.randn(2, 5, 8)).shape == (2, 5, 3)


def test_transformer_block_is_three_residual_steps():
    block = BasicTransformerBlock(16, n_heads=2, d_head=8, context_dim=6)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 4, 6)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    torch.testing.assert_close(block(x, context), h + block.ff(block.norm3(h)))


def test_checkpointing_a_transformer_block_changes_no_gradient():
    x, context = torch.randn(2, 9, 16), torch.randn(2, 4, 6)
    gradients = []
    block = BasicTransformerBlock(16, n_heads=2, d_head=8, context_dim=6)
    assert block.checkpoint  # as published
    for block.checkpoint in (False, True):
        block.zero_grad()
        block(x, context).square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    for without, with_checkpoint in zip(*gradients, strict=True):
        torch.testing.assert_close(with_checkpoint, without)


def test_spatial_transformer_starts_as_the_identity():
    layer = SpatialTransformer(32, n_heads=2, d_head=16, depth=2, context_dim=8)
    x = torch.randn(2, 32, 3, 5)
    assert torch.equal(layer(x, torch.randn(2, 4, 8)), x)


def test_spatial_transformer_moves_with_its_pixels():
    layer = randomise(SpatialTransformer(32, n_heads=2, d_head=16, context_dim=8))
    x, context = torch.randn(1, 32, 3, 5), torch.randn(1, 4, 8)
    turned = layer(x.transpose(2, 3), context).transpose(2, 3)
    torch.testing.assert_close(turned, layer(x, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["spatial", "linear", "self", "block"])
def test_layers_keep_channels_last(layer):
    module = {
        "spatial": lambda: SpatialTransformer(32, 2, 16),
        "linear": lambda: LinearAttention(32, heads=2, dim_head=8),
        "self": lambda: SpatialSelfAttention(32),
        "block": lambda: AttentionBlock(32, num_heads=2),
    }[layer]()
    randomise(module)
    x = torch.randn(2, 32, 4, 6)
    out = module(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-4)
    if layer != "linear":
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_every_block_may_have_its_own_context():
    config = OmegaConf.create({"dims": [6, 10]})
    layer = SpatialTransformer(32, 2, 16, depth=2, context_dim=config.dims)
    assert [block.attn2.to_k.in_features for block in layer.transformer_blocks] == [6, 10]
    layer = SpatialTransformer(32, 2, 16, depth=2, context_dim=[6])
    assert [block.attn2.to_k.in_features for block in layer.transformer_blocks] == [6, 6]
    with pytest.raises(ValueError, match="3 values for 2"):
        SpatialTransformer(32, 2, 16, depth=2, context_dim=[1, 2, 3])


def test_linear_attention_written_out():
    layer = LinearAttention(6, heads=2, dim_head=4)
    x = torch.randn(1, 6, 3, 5)
    q, k, v = layer.to_qkv(x).reshape(3, 2, 4, 15)
    heads = [(k[h].softmax(dim=-1) @ v[h].T).T @ q[h] for h in range(2)]
    expected = layer.to_out(torch.cat(heads).reshape(1, 8, 3, 5))
    torch.testing.assert_close(layer(x), expected)


def test_spatial_self_attention_written_out():
    layer = SpatialSelfAttention(32)
    x = torch.randn(1, 32, 3, 5)
    h = layer.norm(x)
    q, k, v = (conv(h).reshape(32, 15).T for conv in (layer.q, layer.k, layer.v))
    expected = x + layer.proj_out(naive_attention(q, k, v).T.reshape(1, 32, 3, 5))
    torch.testing.assert_close(layer(x), expected)


def test_the_two_orders_of_heads():
    qkv = torch.randn(1, 3 * 8, 5)
    by_head = qkv[0].reshape(2, 3, 4, 5)
    expected = torch.cat([naive_attention(*(part.T for part in by_head[h])).T for h in range(2)])
    torch.testing.assert_close(QKVAttentionLegacy(2)(qkv)[0], expected)
    by_part = qkv[0].reshape(3, 2, 4, 5)
    expected = torch.cat([naive_attention(*(part.T for part in by_part[:, h])).T for h in range(2)])
    torch.testing.assert_close(QKVAttention(2)(qkv)[0], expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_attention_block_starts_as_the_identity_in_any_dimension(shape):
    x = torch.randn(2, 32, *shape)
    assert torch.equal(AttentionBlock(32, num_head_channels=8)(x), x)


def test_heads_that_do_not_divide_the_channels_are_a_user_error():
    with pytest.raises(UserError, match="num_heads 5 does not divide 32 channels"):
        AttentionBlock(32, num_heads=5)
    with pytest.raises(UserError, match="num_head_channels 12 does not divide 32"):
        AttentionBlock(32, num_head_channels=12)


def test_keys_and_values_of_one_context_are_computed_once():
    layer, context = CrossAttention(query_dim=16, context_dim=10, heads=2, dim_head=4), torch.randn(2, 7, 10)
    calls = []
    layer.to_k.register_forward_hook(lambda *_: calls.append("k"))
    layer.to_v.register_forward_hook(lambda *_: calls.append("v"))
    inputs, mask = [torch.randn(2, 5, 16) for _ in range(3)], torch.rand(2, 7) < 0.8
    with torch.no_grad():
        expected = [layer(x, context, mask) for x in inputs]
        calls.clear()
        with cached_contexts(layer):
            outputs = [layer(x, context, mask) for x in inputs]
    assert calls == ["k", "v"]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), "the same bits"


@torch.no_grad()
def test_another_context_gets_its_own_keys_and_values():
    layer = CrossAttention(query_dim=16, context_dim=10, heads=2, dim_head=4)
    twin = copy.deepcopy(layer)
    x, context, other = torch.randn(2, 5, 16), torch.randn(2, 7, 10), torch.randn(2, 3, 10)
    with cached_contexts(layer):
        layer(x, context)
        assert torch.equal(layer(x, other), twin(x, other))
        layer(x, context)
        context.mul_(2)
        assert torch.equal(layer(x, context), twin(x, context)), "written to since"
        assert torch.equal(layer(x, context.clone()), twin(x, context))


@torch.no_grad()
def test_self_attention_is_never_kept():
    layer, x = CrossAttention(query_dim=16, heads=2, dim_head=4), torch.randn(2, 5, 16)
    with cached_contexts(layer):
        first = layer(x)
        x.neg_()
        assert not torch.equal(layer(x), first)


def test_nothing_is_kept_with_gradients_or_outside():
    layer, x = CrossAttention(query_dim=16, context_dim=10, heads=2, dim_head=4), torch.randn(2, 5, 16)
    context = torch.randn(2, 7, 10, requires_grad=True)
    with cached_contexts(nn.ModuleList([layer])):
        for _ in range(2):
            layer(x, context).sum().backward()
        with cached_contexts(layer):
            pass
        assert layer.kept is not None, "the outer one still holds"
    assert layer.kept is None
    assert layer.to_k.weight.grad.abs().sum() > 0
