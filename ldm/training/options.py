"""Options that Lightning's Trainer adds to the command line, read without importing Lightning."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from ldm.config.distribution import install_hint
from ldm.errors import UserError

# Arguments of the Trainer that have their own section in the configuration.
CONFIGURED_ELSEWHERE = frozenset({"logger", "callbacks", "plugins"})


@cache
def trainer_arguments() -> dict[str, bool]:
    """Return every keyword of Lightning's Trainer, and whether its value is a boolean.

    The source code of the installed Lightning provides them. Importing Lightning takes seconds, and `--help` and
    misspelt options should not wait for it.

    Raises:
        UserError: Lightning is not installed.
    """
    spec = importlib.util.find_spec("pytorch_lightning")
    if spec is None or spec.origin is None:
        raise UserError(f"training needs Lightning; install it with {install_hint()}")
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "trainer.py").read_text(encoding="utf-8"))
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    init = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {
        argument.arg: argument.annotation is not None and "bool" in ast.unparse(argument.annotation)
        for argument in (*init.args.args[1:], *init.args.kwonlyargs)
    }
