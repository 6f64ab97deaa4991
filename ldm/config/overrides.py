"""Overrides of configuration values on the command line: `key.sub=value`, and `~key.sub`. Needs no torch."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Sequence

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)+=|~[A-Za-z_]\w*(\.[\w-]+)*$")


def split_overrides(words: Sequence[str], value_options: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Split the words of a command line into overrides, at any position, and all other words.

    An override sets a value, `key.sub=value`, or removes a key, `~key.sub`. The value of an option and the name of an
    existing file are not overrides, even if they look like one.

    Args:
        words: the command line.
        value_options: the options that take the next word as their value.
    """
    overrides: list[str] = []
    others: list[str] = []
    for previous, word in zip(["", *words], words, strict=False):
        is_override = _OVERRIDE.match(word) and previous not in value_options and not os.path.isfile(word)
        (overrides if is_override else others).append(word)
    return overrides, others


def options_with_value(parser: argparse.ArgumentParser) -> set[str]:
    """Return the option strings of `parser` that take exactly one value."""
    actions = (action for action in parser._actions if action.nargs is None)
    return {option for action in actions for option in action.option_strings}
