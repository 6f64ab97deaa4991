"""Statistics of captions and the encoder that reads them: captions that are cut, and words that it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ldm.modules.encoders.truncation import describe, find_truncation

SHOWN = 5  # words that a message lists
UNKNOWN_SHARE = 0.05  # of the words of the captions; fewer words without a token of their own are usual


@dataclass(frozen=True)
class CaptionStatistics:
    """Statistics of captions and the conditioning stage that reads them.

    Attributes:
        captions: number of captions.
        cut: number of captions whose end the model does not read.
        example: description of the first of them; empty if there is none.
        limit: number of tokens that the model reads; 0 if no caption is cut.
        words: number of words.
        unknown: number of words without a token of their own.
        unknown_words: the most frequent of them.
    """

    captions: int
    cut: int = 0
    example: str = ""
    limit: int = 0
    words: int = 0
    unknown: int = 0
    unknown_words: tuple[str, ...] = ()

    @classmethod
    def of(cls, stage: Any, captions: list[str]) -> CaptionStatistics:
        """Return the statistics of captions for a conditioning stage."""
        cut = [(text, found) for text in captions if (found := find_truncation(stage, text)) is not None]
        example = describe(*cut[0], "training caption") if cut else ""
        limit = cut[0][1].limit if cut else 0
        counts = _word_counts(stage, captions)
        unknown = {word: count for word, (count, is_known) in counts.items() if not is_known}
        frequent = tuple(sorted(unknown, key=lambda word: (-unknown[word], word))[:SHOWN])
        words = sum(count for count, _ in counts.values())
        return cls(len(captions), len(cut), example, limit, words, sum(unknown.values()), frequent)

    def messages(self, total: int) -> Iterator[str]:
        """Yield the warnings, each one line.

        Args:
            total: number of items of the data set.
        """
        covered = f"{self.captions} training captions" if self.captions == total else f"{self.captions} of {total}"
        cut, unknown = percentage(self.cut, self.captions), percentage(self.unknown, self.words)
        if self.cut:
            yield (
                f"{cut} of the training captions have more than {self.limit} tokens and "
                f"are cut ({self.cut} of {covered}); raise max_seq_len of the conditioning stage, or shorten them; "
                f"{self.example}"
            )
        if self.unknown > UNKNOWN_SHARE * self.words:
            listed = ", ".join(f'"{word}"' for word in self.unknown_words)
            yield (
                f"{unknown} of the words in the training captions are not in the vocabulary "
                f"and are read in pieces, such as {listed}; "
                "ldm prepare builds a vocabulary with all words that occur twice"
            )


def _word_counts(stage: Any, captions: list[str]) -> dict[str, tuple[int, bool]]:
    """Return the number of each word in the captions, and whether it is a token; empty for an encoder without words.

    Punctuation does not count.
    """
    tokenizer: Any = getattr(stage, "tknz_fn", None)
    if not callable(getattr(tokenizer, "unknown_words", None)):
        return {}
    counts: dict[str, tuple[int, bool]] = {}
    for text in captions:
        unknown = set(tokenizer.unknown_words(text))
        for word in filter(str.isalnum, tokenizer.words(text)):
            count, _ = counts.get(word, (0, True))
            counts[word] = count + 1, word not in unknown
    return counts


def percentage(count: int, total: int) -> str:
    """Return a share as text, such as "12 %"."""
    percent = 100 * count / max(1, total)
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
