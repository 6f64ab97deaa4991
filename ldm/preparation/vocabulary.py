"""Vocabulary of captions: WordPiece tokens that are built from them, and the length of the captions in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from ldm.io.files import atomic_path
from ldm.modules.encoders.caption_statistics import CaptionStatistics, percentage
from ldm.modules.encoders.modules import BERTTokenizer, find_vocabulary

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LARGEST = 30000  # tokens
CAPTIONS_OF_A_TOKEN = 2  # a text in fewer captions than this is no token of its own
ALPHABET = 1000  # characters
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
COVERED = 0.995  # share of the captions that are read to their end
STEP, MOST_TOKENS = 8, 77  # the number of tokens is a multiple, and has an upper bound


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary, and what it means for some captions.

    Attributes:
        name: value of `vocab` in a configuration.
        tokens: its tokens in order, to be written beside the configuration; empty for one on the Hugging Face hub.
        size: number of tokens.
        length: number of tokens of a caption that the model should read.
        longest: tokens of the longest caption.
        statistics: captions that are cut, and words without a token of their own.
    """

    name: str
    tokens: tuple[str, ...]
    size: int
    length: int
    longest: int
    statistics: CaptionStatistics

    def lines(self) -> Iterator[str]:
        """Yield a description, one line for each finding."""
        found = self.statistics
        yield f"vocabulary: {self.size:,} tokens; the longest caption has {self.longest}, the model reads {self.length}"
        if found.cut:
            cut = percentage(found.cut, found.captions)
            yield f"{cut} of the captions have more tokens, and their ends are not read"
        if found.unknown:
            words = ", ".join(found.unknown_words)
            yield f"{percentage(found.unknown, found.words)} of the words are read in pieces, such as: {words}"


def make_vocabulary(captions: Sequence[str], known: str | None, file: Path) -> Vocabulary:
    """Return the vocabulary for captions.

    Args:
        captions: the captions.
        known: a `vocab.txt`, or a name on the Hugging Face hub; None builds a vocabulary from the captions.
        file: the file that receives the tokens, unless they stay on the hub.

    Raises:
        UserError: the known vocabulary does not exist, or cannot be downloaded.
    """
    if known is not None and find_vocabulary(known) is None:
        return _measured(known, (), captions, known)
    tokens = build_tokens(captions) if known is None else _tokens_of(known)
    with atomic_path(file) as temporary:
        temporary.write_text("\n".join(tokens) + "\n", encoding="utf-8", newline="\n")
    return _measured(file.name, tokens, captions, str(file))


def build_tokens(captions: Sequence[str]) -> tuple[str, ...]:
    """Return a WordPiece vocabulary of captions, in the order of its ids; frequent words are single tokens.

    It has all letters and digits of ASCII, so that prompts may contain other words.
    """
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=True)
    characters = {*LETTERS, *"".join(map(tokenizer.normalize, captions))} - {" "}
    # The trainer numbers other characters inside words in a random order, on which its result depends.
    inside = [f"##{character}" for character in sorted(characters)]
    tokenizer.train_from_iterator(
        captions,
        vocab_size=LARGEST,
        min_frequency=CAPTIONS_OF_A_TOKEN,
        limit_alphabet=ALPHABET,
        initial_alphabet=list(LETTERS),
        special_tokens=[*SPECIAL_TOKENS, *inside],
        show_progress=False,
    )
    ids = tokenizer.get_vocab()
    return tuple(sorted(ids, key=lambda token: ids[token]))


def _tokens_of(name: str) -> tuple[str, ...]:
    """Return the tokens of a local vocabulary in the order of its ids."""
    ids = BERTTokenizer(version=name).tokenizer.get_vocab()
    return tuple(sorted(ids, key=lambda token: ids[token]))


def _measured(name: str, tokens: tuple[str, ...], captions: Sequence[str], version: str) -> Vocabulary:
    """Return a vocabulary with the number of tokens that most captions need."""
    tokenizer = BERTTokenizer(version=version, max_length=1 << 16)
    tokenizer.tokenizer.no_padding()
    lengths = sorted(len(encoding.ids) for encoding in tokenizer.tokenizer.encode_batch(list(captions)))
    needed = lengths[min(len(lengths) - 1, int(COVERED * len(lengths)))]
    length, complete = (-(-tokens // STEP) * STEP for tokens in (needed, lengths[-1]))
    length = min(MOST_TOKENS, complete if complete <= length + STEP else length)
    reader = BERTTokenizer(version=version, max_length=length)
    stage = SimpleNamespace(truncation=reader.truncation, tknz_fn=reader)
    statistics = CaptionStatistics.of(stage, list(captions))
    return Vocabulary(name, tokens, reader.tokenizer.get_vocab_size(), length, lengths[-1], statistics)
