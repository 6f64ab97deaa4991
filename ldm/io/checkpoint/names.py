"""Parameter names from files, formatted for log lines and errors."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)


def printable(value: object, limit: int = 80) -> str:
    """Return a name from a file for use in messages, printable and short; for a value that is not text, its type."""
    if not isinstance(value, str):
        return f"<{type(value).__name__}>"
    text = "".join(letter if letter.isprintable() else "?" for letter in value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_names(names: Iterable[str], count: int = 4) -> str:
    """Return the first `count` names, separated by commas, with an ellipsis for the others."""
    names = [printable(name) for name in names]
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def log_names(problem: str, source: str, names: Iterable[str]) -> None:
    """Log a warning with the first of `names`, if there are any: their number, the problem and the source."""
    names = list(names)
    if names:
        logger.warning("%d names %s %s: %s", len(names), problem, source, first_names(names))
