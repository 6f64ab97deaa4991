"""Texts with more tokens than their encoder reads: the end that is cut, and a warning that shows it.

An encoder of texts has a method `truncation(text)`, which returns a `Truncation`, or None if it reads the whole text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from ldm.io.checkpoint.names import printable

logger = logging.getLogger(__name__)

MARKS = 2  # tokens of every text at its start and its end
SHOWN_START, SHOWN_CUT = 40, 200  # characters of a text in the warning


@dataclass(frozen=True)
class Truncation:
    """End of a text that an encoder does not read.

    Attributes:
        tokens: number of tokens of the text, with those that mark its start and its end.
        limit: number of tokens that the encoder reads, with the same two.
        cut: part of the text that it does not read.
    """

    tokens: int
    limit: int
    cut: str

    @classmethod
    def of(cls, text: str, positions: Sequence[tuple[int, int]], limit: int) -> Self | None:
        """Return the truncation of `text`, or None if all of its tokens fit.

        Args:
            text: the whole text.
            positions: start and end in `text` of each token, without the tokens that mark its start and its end.
            limit: number of tokens that the encoder reads, with these two.
        """
        room = limit - MARKS
        if len(positions) <= room:
            return None
        return cls(len(positions) + MARKS, limit, text[positions[room][0] :])


def find_truncation(encoder: object, text: str) -> Truncation | None:
    """Return the truncation of `text` by a conditioning stage; None if there is none, or if it reads no texts."""
    find = getattr(encoder, "truncation", None)
    return find(text) if callable(find) else None


def warn_truncations(encoder: object, texts: Iterable[str], kind: str = "prompt") -> None:
    """Log a warning for each distinct text of which a conditioning stage does not read the end.

    Args:
        encoder: the conditioning stage.
        texts: the texts.
        kind: name of such a text in the warning.
    """
    for text in dict.fromkeys(texts):
        found = find_truncation(encoder, text)
        if found is not None:
            logger.warning("%s", describe(text, found, kind))


def describe(text: str, found: Truncation, kind: str) -> str:
    """Return one line that states the number of tokens of `text`, and shows what is cut."""
    return (
        f'the {kind} "{_shown(text, SHOWN_START)}" has {found.tokens} tokens (start and end token included), and the '
        f'model reads {found.limit}; cut: "… {_shown(found.cut, SHOWN_CUT)}"'
    )


def _shown(text: str, limit: int) -> str:
    return printable(" ".join(text.split()), limit)
