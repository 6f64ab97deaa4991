"""Errors that users can fix, and helpers for their messages. Imports nothing of this package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Error in the input of a user, as one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` reports a lack of memory, on the CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch raises a RuntimeError on the CPU.
    return any(words in str(error) for words in ("allocate memory", "Storage size calculation overflowed"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `' (did you mean "x"?)'` with the most similar word of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""
