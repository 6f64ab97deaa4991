"""Tests of the transformer over token ids."""

from __future__ import annotations

import pytest
import torch

from ldm.errors import UserError
from ldm.modules.x_transformer import Decoder, Encoder, TransformerWrapper

pytestmark = pytest.mark.usefixtures("seed")


def wrapper(layers=Encoder, **kwargs):
    return TransformerWrapper(20, 6, layers(dim=16, depth=2, heads=2, attn_dim_head=8), **kwargs).eval()


def test_state_dict_names_match_x_transformers():
    names = set(TransformerWrapper(20, 6, Encoder(dim=16, depth=1), emb_dim=8).state_dict())
    attention = {f"attn_layers.layers.0.1.{n}" for n in ("to_q.weight", "to_k.weight", "to_v.weight")}
    attention |= {f"attn_layers.layers.0.1.to_out.{n}" for n in ("weight", "bias")}
    perceptron = {f"attn_layers.layers.1.1.net.{i}.{n}" for i in ("0.0", "2") for n in ("weight", "bias")}
    norms = {f"attn_layers.layers.{i}.0.{n}" for i in (0, 1) for n in ("weight", "bias")}
    ends = {f"{layer}.{n}" for layer in ("project_emb", "norm", "to_logits") for n in ("weight", "bias")}
    assert names == {"token_emb.weight", "pos_emb.emb.weight"} | attention | perceptron | norms | ends


def test_layers_are_residual_with_pre_normalisation():
    model = wrapper()
    tokens = torch.randint(20, (2, 5))
    h = model.token_emb(tokens) + model.pos_emb.emb.weight[:5]
    for norm, block in model.attn_layers.layers:
        h = h + block(norm(h))
    embeddings = model(tokens, return_embeddings=True)
    torch.testing.assert_close(embeddings, model.norm(h))
    torch.testing.assert_close(model(tokens), model.to_logits(embeddings))


def changed_positions(model, tokens, position, **kwargs):
    """Return for each output position whether it changes with the token at `position`."""
    other = tokens.clone()
    other[:, position] = (other[:, position] + 1) % 20
    difference = model(tokens, **kwargs) - model(other, **kwargs)
    return (difference.abs().amax(dim=(0, 2)) > 1e-6).tolist()


def test_encoder_attends_to_all_tokens_and_decoder_to_earlier_ones():
    tokens = torch.randint(20, (2, 5))
    assert changed_positions(wrapper(Encoder), tokens, 2) == [True] * 5
    assert changed_positions(wrapper(Decoder), tokens, 2) == [False, False, True, True, True]


def test_masked_tokens_are_ignored():
    tokens = torch.randint(20, (2, 5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3] = False
    assert changed_positions(wrapper(Encoder), tokens, 3, mask=mask) == [False, False, False, True, False]
    assert changed_positions(wrapper(Decoder), tokens, 3, mask=mask) == [False, False, False, True, False]
    # The mask and the causal mask are combined.
    assert changed_positions(wrapper(Decoder), tokens, 2, mask=mask) == [False, False, True, True, True]


def test_too_many_tokens_raise_user_error():
    with pytest.raises(UserError, match="has 7 tokens, but the transformer has 6 positions"):
        wrapper()(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize("option", ["emb_dropout", "attn_dropout", "ff_dropout"])
def test_dropout_is_active_in_training_only(option):
    layers = {option: 0.5} if option != "emb_dropout" else {}
    outer = {option: 0.5} if option == "emb_dropout" else {}
    model = TransformerWrapper(20, 6, Encoder(dim=16, depth=1, **layers), **outer)
    tokens = torch.randint(20, (2, 5))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_gated_perceptron_doubles_the_projection():
    model = TransformerWrapper(20, 6, Encoder(dim=16, depth=1, ff_glu=True, ff_mult=2))
    assert model.attn_layers.layers[1][1].net[0].proj.out_features == 64
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 20)
