"""Tests of `ldm.modules.encoders.truncation`, with the tokenizers of BERT and CLIP."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, write_clip

from ldm.modules.encoders.modules import BERTEmbedder, BERTTokenizer, FrozenCLIPTextEmbedder
from ldm.modules.encoders.truncation import Truncation, describe, find_truncation, warn_truncations

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s", ","]


@pytest.fixture
def vocab(tmp_path):
    """Return a folder with a small vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return str(tmp_path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a CLIP that reads 6 tokens."""
    pytest.importorskip("transformers")
    return FrozenCLIPTextEmbedder(str(write_clip(tmp_path_factory.mktemp("clip"), tokens=12)), max_length=6)


def test_text_that_fits_exactly_is_not_truncated(vocab):
    tokenizer = BERTTokenizer(max_length=5, version=vocab)
    assert tokenizer.truncation("a red cat") is None, "[CLS] a red cat [SEP]"
    assert tokenizer.truncation("") is None
    assert tokenizer.truncation("a red cat a") == Truncation(6, 5, "a")


@pytest.mark.parametrize(
    ("text", "tokens", "cut"),
    [
        ("A RÉD  Cat,\n with ä zebra", 9, ",\n with ä zebra"),
        ("a a cats", 6, "s"),
        ("a, red cat " * 30, 122, "cat " + "a, red cat " * 29),
        ("a red 猫猫猫", 7, "猫猫"),
    ],
)
def test_cut_text_of_bert_has_the_spelling_of_the_prompt(vocab, text, tokens, cut):
    assert BERTTokenizer(max_length=5, version=vocab).truncation(text) == Truncation(tokens, 5, cut)


def test_number_of_tokens_includes_the_start_and_the_end(vocab):
    tokenizer, text = BERTTokenizer(max_length=5, version=vocab), "a red cat, cats a red"
    complete = BERTTokenizer(max_length=77, version=vocab).tokenizer.encode(text)
    assert tokenizer.truncation(text).tokens == sum(complete.attention_mask)


def test_truncation_agrees_with_the_tokens_that_are_encoded(vocab):
    tokenizer, text = BERTTokenizer(max_length=6, version=vocab), "a red cats, a red cats"
    found = tokenizer.truncation(text)
    assert torch.equal(tokenizer(text), tokenizer(text.removesuffix(found.cut)))


def test_embedder_of_tokens_has_no_truncation(vocab):
    embedder = BERTEmbedder(8, 1, vocab_size=9, max_seq_len=5, vocab=vocab)
    assert embedder.truncation("a red cat a") == Truncation(6, 5, "a")
    tokens = BERTEmbedder(8, 1, vocab_size=9, max_seq_len=5, use_tokenizer=False)
    assert tokens.truncation("a red cat a") is None
    assert find_truncation(torch.nn.Identity(), "a") is None and find_truncation(None, "a") is None


def test_cut_text_of_clip_has_the_spelling_of_the_prompt(clip):
    assert clip.truncation("Cat cat CAT cat") is None
    assert clip.truncation("Cat cat CAT cat  Cat A") == Truncation(8, 6, "Cat A")
    assert torch.equal(clip("Cat cat CAT cat  Cat A"), clip("Cat cat CAT cat"))


def test_cut_text_of_a_tokenizer_without_positions_is_decoded(clip, monkeypatch):
    """The tokenizer of transformers 4 has no positions."""
    monkeypatch.setattr(type(clip.tokenizer), "is_fast", False)
    assert clip.truncation("Cat cat CAT cat") is None
    found = clip.truncation("Cat cat CAT cat  Cat A")
    assert (found.tokens, found.limit, found.cut.strip()) == (8, 6, "cat a")


def test_each_distinct_text_is_one_line(vocab, caplog):
    tokenizer = BERTTokenizer(max_length=5, version=vocab)
    long, other = "a red\ncat, a  cat", "cat cat cat cat"
    warn_truncations(tokenizer, [long, "a cat", long, other, long], "negative prompt")
    assert [record.getMessage() for record in caplog.records] == [
        'the negative prompt "a red cat, a cat" has 8 tokens (start and end token included), and the model reads 5; '
        'cut: "… , a cat"',
        'the negative prompt "cat cat cat cat" has 6 tokens (start and end token included), and the model reads 5; '
        'cut: "… cat"',
    ]


def test_long_texts_are_shortened():
    text = "word " * 1000
    line = describe(text, Truncation(1002, 77, text[375:]), "prompt")
    assert "\n" not in line and len(line) < 400
    assert '"word word word word word word word word…"' in line and "1002 tokens" in line
    assert describe("a\x1b[31m b", Truncation(9, 3, "\x07b"), "prompt").isprintable()


def test_vocabulary_of_the_bundled_models_has_positions():
    found = BERTTokenizer(max_length=16, version=str(VOCAB)).truncation("Red Heart " * 10)
    assert found == Truncation(22, 16, "Red Heart " * 3)
