"""Tests of `ldm.preparation.vocabulary`."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.modules.encoders.modules import BERTTokenizer
from ldm.preparation.vocabulary import SPECIAL_TOKENS, build_tokens, make_vocabulary

CAPTIONS = [f"A {colour} Bird on a {place}" for colour in ("red", "grey") for place in ("branch", "café", "wire")]


def test_the_vocabulary_is_built_from_the_captions(tmp_path):
    found = make_vocabulary(CAPTIONS, None, tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1] == list(found.tokens)
    assert found.name == "vocab.txt" and found.size == len(found.tokens)
    assert found.tokens[:5] == tuple(SPECIAL_TOKENS)
    assert {"red", "grey", "bird", "branch", "cafe", "wire"} <= set(found.tokens)
    assert (found.longest, found.length) == (8, 8) and not found.statistics.cut and not found.statistics.unknown
    assert list(found.lines()) == [f"vocabulary: {found.size} tokens; the longest caption has 8, the model reads 8"]


def test_the_vocabulary_is_the_same_each_time():
    words = np.random.default_rng(0).choice(list("abcdefghijkl"), (300, 6))
    captions = ["".join(word) for word in words] * 2
    assert build_tokens(captions) == build_tokens(captions[::-1])


def test_other_words_are_read_in_pieces_not_as_unknown(tmp_path):
    make_vocabulary(CAPTIONS, None, tmp_path / "vocab.txt")
    tokenizer = BERTTokenizer(version=str(tmp_path / "vocab.txt"), max_length=20).tokenizer
    assert "[UNK]" not in tokenizer.encode("zyx 0189 jpq").tokens


def test_a_known_vocabulary_is_copied_and_measured(tmp_path, repo_root):
    known = repo_root / "data/emoji/vocab.txt"
    captions = ["red heart", "zyzzyva heart " * 40]
    found = make_vocabulary(captions, str(known), tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") == known.read_text(encoding="utf-8")
    assert found.size == 1619 and found.length == 77 and found.longest > 77
    assert found.statistics.cut == 1 and found.statistics.unknown_words == ("zyzzyva",)
    _, cut, unknown = found.lines()
    assert cut == "50 % of the captions have more tokens, and their ends are not read"
    assert unknown == "49 % of the words are read in pieces, such as: zyzzyva"


def test_a_few_long_captions_do_not_set_the_length(tmp_path):
    captions = [*["red heart"] * 999, "red " * 60]
    found = make_vocabulary(captions, None, tmp_path / "vocab.txt")
    assert (found.length, found.longest, found.statistics.cut) == (8, 62, 1)


def test_missing_vocabulary_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"words\.txt does not exist"):
        make_vocabulary(CAPTIONS, "words.txt", tmp_path / "vocab.txt")
    assert not (tmp_path / "vocab.txt").exists()
