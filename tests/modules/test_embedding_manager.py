"""Tests of `ldm.modules.embedding_manager`: learned vectors of new words in prompts."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch
from tiny_models import make_model, write_clip
from tiny_stable_diffusion import stable_diffusion_config

from ldm.errors import UserError
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.truncation import warn_truncations

WIDTH = 16


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("vocabulary") / "clip")


@pytest.fixture(params=[1, 2], ids=["CLIP", "OpenCLIP"])
def encoder(request, vocabulary):
    return make_model(stable_diffusion_config(request.param, vocabulary)).cond_stage_model


def with_words(encoder, **tokens):
    """Add random vectors, their number by token."""
    encoder.embedding_manager = manager = EmbeddingManager(encoder)
    generator = torch.Generator().manual_seed(0)
    for token, count in tokens.items():
        manager.add(token, torch.randn(count, WIDTH, generator=generator))
    return manager


def test_ids_of_learned_vectors_are_negative(encoder):
    manager = with_words(encoder, **{"<a>": 2, "*": 1})
    cat, b = (encoder.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("cat", "b"))
    assert manager.encode("cat <a>b * <A>").ids == [*cat, -1, -2, *b, -3, -1, -2]
    assert manager.encode("cat b").ids == [*cat, *b]
    tokens = encoder.tokens(["<a> cat", "cat"])
    pad = 0 if encoder.pad_with_zero else 1
    assert tokens.shape == (2, 77) and tokens[0, :6].tolist() == [0, -1, -2, *cat, 1, pad]
    assert torch.equal(tokens[1:], encoder.tokens("cat")), "as without learned vectors"


def test_prompts_without_tokens_do_not_change(encoder):
    before = encoder(["a cat", ""])
    with_words(encoder, **{"<a>": 2})
    assert torch.equal(encoder(["a cat", ""]), before)
    mixed = encoder(["a cat", "<a>"])
    torch.testing.assert_close(mixed[:1], before[:1])


def test_vectors_of_a_word_are_used_as_its_embedding(encoder):
    ids = encoder.tokenizer("cat", add_special_tokens=False)["input_ids"]
    manager = with_words(encoder)
    manager.add("<a>", encoder.token_embedding.weight[ids])
    assert torch.equal(encoder("b <a> c"), encoder("b cat c"))


def test_longer_tokens_are_found_first_and_words_stay_whole(encoder):
    manager = with_words(encoder, toy=1, **{"toy car": 1})
    assert manager.encode("toy car").ids == [-2] and manager.encode("toy").ids == [-1]
    assert not manager.mentions("toys") and not manager.mentions("atoy")
    assert manager.mentions("a toy, b") and manager.mentions("TOY")
    manager.add("is", torch.zeros(1, WIDTH))
    assert manager.encode("İ\u017f i\u017f").ids[-1] == -3, "letters with several lower cases"


def test_gradients_reach_the_vectors_alone(encoder):
    encoder.embedding_manager = manager = EmbeddingManager(encoder, ["<a>", "<b>"], num_vectors_per_token=2)
    encoder("c <a>").square().sum().backward()
    first, second = manager.embedding_parameters()
    assert first.grad.abs().amax(dim=1).gt(0).all() and second.grad.eq(0).all()
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if "manager" not in name)


def test_truncation_counts_all_vectors(encoder, caplog):
    with_words(encoder, **{"<a>": 70})
    assert encoder.truncation("<a> a b c d e") is None
    found = encoder.truncation("<a> a b c d e f g")
    assert (found.tokens, found.limit, found.cut) == (79, 77, "f g")
    assert encoder.tokens("<a> a b c d e f g").shape == (1, 77)
    with caplog.at_level(logging.WARNING):
        warn_truncations(encoder, ["<a> <a>"])
    assert "has 142 tokens (start and end token included), and the model reads 77" in caplog.text


def test_copies_and_pickles_keep_the_vectors(encoder):
    with_words(encoder, **{"<a>": 1})
    expected = encoder("b <a>")
    assert torch.equal(copy.deepcopy(encoder)("b <a>"), expected)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))("b <a>"), expected)


def test_half_precision(encoder):
    with_words(encoder, **{"<a>": 1})
    expected = encoder("b <a>")
    output = encoder.to(torch.bfloat16)("b <a>")
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


def test_published_files_are_written_and_read_back(encoder, tmp_path):
    manager = with_words(encoder, **{"*": 2})
    manager.save(tmp_path / "embeddings_gs-5.pt")
    vectors = manager.string_to_param_dict["*"].clone()
    saved = torch.load(tmp_path / "embeddings_gs-5.pt", weights_only=True)
    assert set(saved) == {"string_to_token", "string_to_param"} and torch.equal(saved["string_to_param"]["*"], vectors)
    other = with_words(encoder)
    other.load(tmp_path / "embeddings_gs-5.pt")
    assert torch.equal(other.string_to_param_dict["*"], vectors)
    other.load(tmp_path / "embeddings_gs-5.pt")
    assert len(other.vectors) == 1, "replaced"
    third = with_words(encoder, **{"*": 3})
    with pytest.raises(UserError, match=r"has vectors of the shape \(2, 16\), the model \(3, 16\); change num_vectors"):
        third.load(tmp_path / "embeddings_gs-5.pt")


def test_words_start_at_embeddings_or_at_random(encoder):
    torch.manual_seed(0)
    manager = EmbeddingManager(encoder, ["<a>", "<b>"], ["cat"], num_vectors_per_token=3)
    assert not any(vectors.any() for vectors in manager.vectors)
    manager.initialise()
    weight = encoder.token_embedding.weight
    first, second = manager.vectors
    assert torch.equal(first, weight[[55, 55, 55]])
    assert 0.5 * weight.std() < second.std() < 2 * weight.std()
    before = first.clone()
    manager.initialise()
    assert torch.equal(first, before), "vectors with values keep them"


@pytest.mark.parametrize(
    ("token", "shape", "message"),
    [
        ("<a>", (1, WIDTH), 'x: the token "<a>" exists already; give each embedding its own'),
        (" <A> ", (1, WIDTH), 'x: the token " <A> " exists already'),
        ("", (1, WIDTH), "x: a token is empty; give a word such as <cat-toy>"),
        ("<b>", (1, 768), "x belongs to another model: its vectors have the shape (1, 768), here (N, 16); give an"),
        ("cat", (1, WIDTH), 'x: the token "cat" is a word of the vocabulary; choose another one, such as <cat>'),
    ],
)
def test_invalid_embeddings_raise_user_error(token, shape, message, encoder):
    manager = with_words(encoder, **{"<a>": 1})
    with pytest.raises(UserError, match=re.escape(message)) as error:
        manager.check(token, torch.zeros(shape), "x")
    assert "\n" not in str(error.value)
