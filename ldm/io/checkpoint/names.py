"""Names of weights, and names from files formatted for log lines and errors."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

logger = logging.getLogger(__name__)
EMA_PREFIX = "model_ema."  # of moving averages


TEXT_MODEL = "text_model."  # part of the names of CLIP's text model, which some versions of transformers leave out
POSITION_IDS = "embeddings.position_ids"  # entry of published files that is computed


def respelled(names: Iterable[str], own: Collection[str]) -> dict[str, str | None]:
    """Map the names of a CLIP's text model to the spelling that a module has, and computed entries to None.

    Args:
        names: names of weights; those without another spelling are left out.
        own: names of the module's weights.
    """
    other = {name.replace(TEXT_MODEL, "", 1): name for name in own if TEXT_MODEL in name}
    found: dict[str, str | None] = {}
    for name in names:
        if name in own:
            continue
        without = name.replace(TEXT_MODEL, "", 1)
        if name in other or without in own:
            found[name] = other.get(name, without)
        elif name.endswith(POSITION_IDS):
            found[name] = None
    return found


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
