"""Errors that users can fix, and helpers for their messages. Imports nothing of this package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(Exception):
    """Error in the input of a user, as one line: what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 2.
    """


class Terminated(KeyboardInterrupt):
    """Interruption by SIGTERM, after which a command exits with status 143 instead of 130."""


class DiskFullError(UserError):
    """The disk, or the quota of the user, has no room left, so that nothing more can be written."""


class PartialResultError(UserError):
    """Some images of a run could not be computed; the others are in `images`.

    Attributes:
        images: a result for each request, in order; None for those that could not be computed.
        errors: the error of each of these, by its index in `images`.
    """

    def __init__(self, message: str, images: Sequence[Any] = (), errors: Mapping[int, UserError] | None = None) -> None:
        super().__init__(message)
        self.images, self.errors = list(images), dict(errors or {})


class UserErrors(UserError):
    """Several errors in the input of a user, reported together.

    Attributes:
        messages: the errors, one line each.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)


class ErrorCollector:
    """Collector of independent errors of a user, which are then raised together.

    Attributes:
        messages: the errors so far, without repetitions.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, *messages: str) -> None:
        """Add errors."""
        self.messages += [message for message in dict.fromkeys(messages) if message not in self.messages]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add the error that ends the block, if there is one."""
        try:
            yield
        except UserErrors as errors:
            self.add(*errors.messages)
        except UserError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raise the errors, if there are any.

        Raises:
            UserError: the only error, or all errors as `UserErrors`.
        """
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise UserErrors(self.messages)


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
