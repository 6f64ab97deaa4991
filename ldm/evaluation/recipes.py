"""Recipes: files with the options of evaluations, such as the rows of a published table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.config.assets import locate
from ldm.errors import UserError, did_you_mean

TASKS = ("samples", "reconstructions", "restorations", "likelihood")
KEYS = {"name", "row", "task", "arguments", "options"}


@dataclass(frozen=True)
class Run:
    """One evaluation of a recipe.

    Attributes:
        name: its name in the recipe.
        row: the published row that it repeats.
        words: the sub-command with its arguments and options.
    """

    name: str
    row: str
    words: tuple[str, ...]


def read_recipe(path: str | Path, only: Sequence[str] = ()) -> list[Run]:
    """Read a recipe.

    Args:
        path: a YAML file with a list `runs`. A run has a `name`, a `task`, and may have a `row`, a list of `arguments`
            and a mapping of `options`: names without dashes, and values, lists of values, or true.
        only: names of the runs to return; default: all.

    Raises:
        UserError: the file is missing or is not a recipe, or has no run of a name in `only`.
    """
    found = locate(path)
    try:
        content = yaml.safe_load(found.read_text(encoding="utf-8"))
        entries = content["runs"]
        runs = [_run(entry) for entry in entries]
    except FileNotFoundError:
        raise UserError(f'there is no recipe "{path}"; see configs/evaluation') from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f'"{path}" is not a recipe of ldm evaluate ({reason}); see configs/evaluation') from None
    names = [run.name for run in runs]
    for name in only:
        if name not in names:
            raise UserError(f'"{path}" has no run "{name}"{did_you_mean(name, names)}; known: {", ".join(names)}')
    return [run for run in runs if not only or run.name in only]


def _run(entry: dict[str, Any]) -> Run:
    """Return the run of an entry.

    Raises:
        ValueError: a key or a task is unknown.
        KeyError: the name or the task is missing.
    """
    for key in entry:
        if key not in KEYS:
            raise ValueError(f'unknown key "{key}"')
    if entry["task"] not in TASKS:
        raise ValueError(f'task "{entry["task"]}" is not one of {", ".join(TASKS)}')
    words = [entry["task"], *map(str, entry.get("arguments") or ())]
    for name, value in (entry.get("options") or {}).items():
        if value is False or value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return Run(str(entry["name"]), str(entry.get("row", "")), tuple(words))
