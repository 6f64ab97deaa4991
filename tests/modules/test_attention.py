"""Tests of the attention layers against closed forms and torch.nn.MultiheadAttention."""

from __future__ import annotations

import copy

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
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
    """Compute softmax attention of (N, d) matrices with the explicit formula."""
    return (q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


@torch.no_grad()
def randomise(module):
    for parameter in module.parameters():
        parameter.normal_(std=0.2)
    return module


def torch_attention(layer, dim, context_dim):
    """Return a torch.nn.MultiheadAttention with the weights of `layer`."""
    reference = nn.MultiheadAttention(dim, layer.heads, kdim=context_dim, vdim=context_dim, batch_first=True)
    with torch.no_grad():
        reference.in_proj_bias.zero_()
        reference.q_proj_weight.copy_(layer.to_q.weight)
        reference.k_proj_weight.copy_(layer.to_k.weight)
        reference.v_proj_weight.copy_(layer.to_v.weight)
        reference.out_proj.load_state_dict(layer.to_out[0].state_dict())
    return reference


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention_matches_torch(masked):
    layer = CrossAttention(query_dim=24, context_dim=10, heads=3, dim_head=8)
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    mask = torch.rand(2, 7) < 0.6 if masked else None
    expected, _ = torch_attention(layer, 24, 10)(x, context, context, key_padding_mask=~mask if masked else None)
    torch.testing.assert_close(layer(x, context, mask), expected)


def test_attention_without_context_is_self_attention():
    layer = CrossAttention(query_dim=16, heads=2, dim_head=4)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x), layer(x, x))


def test_only_the_output_projection_of_attention_has_a_bias():
    names = set(CrossAttention(16, 8).state_dict())
    assert names == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}


def test_geglu_gates_the_first_half_by_the_gelu_of_the_second():
    layer = GEGLU(4, 6)
    x = torch.randn(3, 4)
    values, gates = layer.proj(x)[:, :6], layer.proj(x)[:, 6:]
    torch.testing.assert_close(layer(x), values * gelu(gates))


def test_feed_forward_with_and_without_gate():
    assert isinstance(FeedForward(8, glu=True).net[0], GEGLU)
    plain = FeedForward(8, dim_out=3, mult=2)
    assert plain.net[0][0].out_features == 16
    assert plain(torch.randn(2, 5, 8)).shape == (2, 5, 3)


def test_transformer_block_has_three_residual_layers():
    block = BasicTransformerBlock(16, n_heads=2, d_head=8, context_dim=6)
    x, context = torch.randn(2, 9, 16), torch.randn(2, 4, 6)
    h = x + block.attn1(block.norm1(x))
    h = h + block.attn2(block.norm2(h), context)
    torch.testing.assert_close(block(x, context), h + block.ff(block.norm3(h)))


def test_checkpointing_a_transformer_block_preserves_gradients():
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


def test_new_spatial_transformer_is_the_identity():
    layer = SpatialTransformer(32, n_heads=2, d_head=16, depth=2, context_dim=8)
    x = torch.randn(2, 32, 3, 5)
    assert torch.equal(layer(x, torch.randn(2, 4, 8)), x)


def test_spatial_transformer_is_equivariant_to_transposition():
    layer = randomise(SpatialTransformer(32, n_heads=2, d_head=16, context_dim=8))
    x, context = torch.randn(1, 32, 3, 5), torch.randn(1, 4, 8)
    transposed = layer(x.transpose(2, 3), context).transpose(2, 3)
    torch.testing.assert_close(transposed, layer(x, context), rtol=1e-4, atol=1e-4)


SPATIAL_LAYERS = {
    "spatial": lambda: SpatialTransformer(32, 2, 16),
    "linear": lambda: LinearAttention(32, heads=2, dim_head=8),
    "self": lambda: SpatialSelfAttention(32),
    "block": lambda: AttentionBlock(32, num_heads=2),
}


@pytest.mark.parametrize("layer", SPATIAL_LAYERS)
def test_layers_preserve_channels_last(layer):
    module = randomise(SPATIAL_LAYERS[layer]())
    x = torch.randn(2, 32, 4, 6)
    out = module(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-4)
    if layer != "linear":
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layer", SPATIAL_LAYERS)
def test_layers_run_on_fake_tensors(layer):
    with FakeTensorMode():
        x = torch.randn(2, 32, 4, 6)
        assert SPATIAL_LAYERS[layer]()(x).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("layer", ["linear", "block"])
def test_layers_compile_without_graph_breaks(layer):
    module, x = randomise(SPATIAL_LAYERS[layer]()), torch.randn(2, 32, 4, 6)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_every_block_may_have_its_own_context():
    config = OmegaConf.create({"dims": [6, 10]})
    layer = SpatialTransformer(32, 2, 16, depth=2, context_dim=config.dims)
    assert [block.attn2.to_k.in_features for block in layer.transformer_blocks] == [6, 10]
    layer = SpatialTransformer(32, 2, 16, depth=2, context_dim=[6])
    assert [block.attn2.to_k.in_features for block in layer.transformer_blocks] == [6, 6]
    with pytest.raises(ValueError, match="3 values for 2"):
        SpatialTransformer(32, 2, 16, depth=2, context_dim=[1, 2, 3])


def test_linear_attention_matches_its_formula():
    layer = LinearAttention(6, heads=2, dim_head=4)
    x = torch.randn(1, 6, 3, 5)
    q, k, v = layer.to_qkv(x).reshape(3, 2, 4, 15)
    heads = [(k[h].softmax(dim=-1) @ v[h].T).T @ q[h] for h in range(2)]
    expected = layer.to_out(torch.cat(heads).reshape(1, 8, 3, 5))
    torch.testing.assert_close(layer(x), expected)


def test_spatial_self_attention_matches_its_formula():
    layer = SpatialSelfAttention(32)
    x = torch.randn(1, 32, 3, 5)
    h = layer.norm(x)
    q, k, v = (conv(h).reshape(32, 15).T for conv in (layer.q, layer.k, layer.v))
    expected = x + layer.proj_out(naive_attention(q, k, v).T.reshape(1, 32, 3, 5))
    torch.testing.assert_close(layer(x), expected)


def test_both_orders_of_heads_match_their_formulas():
    qkv = torch.randn(1, 3 * 8, 5)
    by_head = qkv[0].reshape(2, 3, 4, 5)
    expected = torch.cat([naive_attention(*(part.T for part in by_head[h])).T for h in range(2)])
    torch.testing.assert_close(QKVAttentionLegacy(2)(qkv)[0], expected)
    by_part = qkv[0].reshape(3, 2, 4, 5)
    expected = torch.cat([naive_attention(*(part.T for part in by_part[:, h])).T for h in range(2)])
    torch.testing.assert_close(QKVAttention(2)(qkv)[0], expected)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_new_attention_block_is_the_identity_in_every_dimension(shape):
    x = torch.randn(2, 32, *shape)
    assert torch.equal(AttentionBlock(32, num_head_channels=8)(x), x)


def test_heads_that_do_not_divide_the_channels_raise_user_error():
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
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)), "the results are bitwise equal"


@torch.no_grad()
def test_keys_and_values_of_other_or_modified_contexts_are_recomputed():
    layer = CrossAttention(query_dim=16, context_dim=10, heads=2, dim_head=4)
    uncached = copy.deepcopy(layer)
    x, context, other = torch.randn(2, 5, 16), torch.randn(2, 7, 10), torch.randn(2, 3, 10)
    with cached_contexts(layer):
        layer(x, context)
        assert torch.equal(layer(x, other), uncached(x, other))
        layer(x, context)
        context.mul_(2)
        assert torch.equal(layer(x, context), uncached(x, context)), "the context was modified"
        assert torch.equal(layer(x, context.clone()), uncached(x, context))


@torch.no_grad()
def test_self_attention_is_not_cached():
    layer, x = CrossAttention(query_dim=16, heads=2, dim_head=4), torch.randn(2, 5, 16)
    with cached_contexts(layer):
        first = layer(x)
        x.neg_()
        assert not torch.equal(layer(x), first)


def test_nothing_is_cached_with_gradients_or_outside():
    layer, x = CrossAttention(query_dim=16, context_dim=10, heads=2, dim_head=4), torch.randn(2, 5, 16)
    context = torch.randn(2, 7, 10, requires_grad=True)
    with cached_contexts(nn.ModuleList([layer])):
        for _ in range(2):
            layer(x, context).sum().backward()
        with cached_contexts(layer):
            pass
        assert layer.cache is not None, "the outer context manager is still active"
    assert layer.cache is None
    assert layer.to_k.weight.grad.abs().sum() > 0
