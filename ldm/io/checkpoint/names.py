"""Parameter names from files, formatted for log lines and errors."""

from __future__ import annotations

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)


def printable(value: object, limit: int = 80) -> str:
    """A name out of a file, fit for one line of a message: printable, short, and if it is no text its type."""
    if not isinstance(value, str):
        return f"<{type(value).__name__}>"
    text = "".join(letter if letter.isprintable() else "?" for letter in value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_names(names: Iterable[str], count: int = 4) -> str:
    names = [printable(name) for name in names]
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def log_names(what: str, where: str, names: Iterable[str]) -> None:
    names = list(names)
    if names:
        logger.warning("%d names %s %s: %s", len(names), what, where, first_names(names))
