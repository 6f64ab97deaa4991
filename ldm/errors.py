"""Errors that users can correct, and what messages about them share. Imports nothing of this package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where and what to do.

    Commands print it without a traceback and exit with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is for want of memory: Python's own, torch's on a GPU, or in its allocator's words on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("allocate memory", "Storage size calculation overflowed"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`' (did you mean "x"?)'` for the closest of `known`, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
