"""Overrides of configuration values on the command line: `key.sub=value`. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)+=")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command line into overrides, at any position, and all other words."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    return overrides, [word for word in words if not _OVERRIDE.match(word)]
