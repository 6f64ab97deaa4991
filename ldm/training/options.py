"""The command line of `main.py`, read without importing anything heavy."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ldm.cli.command import Parser
from ldm.cli.options import seed, target_options
from ldm.errors import UserError, did_you_mean

# Trainer arguments with a section of their own in the configuration.
CONFIGURED_ELSEWHERE = frozenset({"logger", "callbacks", "plugins"})
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)+=", re.DOTALL)


@cache
def trainer_arguments() -> dict[str, bool]:
    """Every keyword of Lightning's Trainer, and whether it takes a truth value.

    They are read off the source of the installed Lightning: importing it takes seconds, and `--help` and
    misspelt options should not have to wait for that.

    Raises:
        UserError: Lightning is not installed.
    """
    spec = importlib.util.find_spec("pytorch_lightning")
    if spec is None or spec.origin is None:
        raise UserError('training needs Lightning; install it with "pip install pytorch-lightning"')
    tree = ast.parse((Path(spec.origin).parent / "trainer" / "trainer.py").read_text(encoding="utf-8"))
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    init = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {
        argument.arg: argument.annotation is not None and "bool" in ast.unparse(argument.annotation)
        for argument in (*init.args.args[1:], *init.args.kwonlyargs)
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; `overrides` holds `key.sub=value`, `trainer` the Trainer's arguments.

    Raises:
        UserError: something that is neither an option nor `key.sub=value`, or options that exclude each other.
    """
    import sys

    words = list(sys.argv[1:] if argv is None else argv)
    overrides = [word for word in words if _OVERRIDE.match(word)]
    parser = _parser()
    chosen, rest = parser.parse_known_args([word for word in words if not _OVERRIDE.match(word)])
    for word in rest:
        if word.startswith("-"):
            name = word.split("=")[0]
            known = [*parser._option_string_actions]
            raise UserError(f"there is no option {name}{did_you_mean(name, known)}; see {parser.prog} --help")
        if "=" not in word:
            raise UserError(f'"{word}" is neither an option nor key.sub=value; files go after --base')
    chosen.overrides = [*overrides, *rest]
    names = trainer_arguments().keys() | {"gpus"}
    chosen.trainer = {name: value for name, value in vars(chosen).items() if name in names}
    if chosen.name and chosen.resume:
        raise UserError("-n/--name and -r/--resume exclude each other; to name a continued run use -f/--postfix")
    return chosen


def _parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Train a model from configurations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_epilog(),
        allow_abbrev=False,
        parents=[target_options()],
    )
    flag = {"nargs": "?", "const": True, "type": truth, "metavar": "BOOL"}
    add = parser.add_argument
    add("-n", "--name", nargs="?", const="", default="", help="end of the log folder's name")
    add("-r", "--resume", default="", metavar="PATH", help="continue a log folder or a checkpoint")
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="configurations, merged from left to right")
    add("-t", "--train", default=False, help="train", **flag)
    add("--no-test", default=False, help="skip the test after training", **flag)
    add("-p", "--project", help="accepted for compatibility; has no effect")
    add("-d", "--debug", default=False, help="debug after an error; the log folder ends under debug_runs/", **flag)
    add("-s", "--seed", type=seed, default=23, help="for every random choice (default: 23)")
    add("-f", "--postfix", default="", help="appended to the log folder's name")
    add("-l", "--logdir", default="logs", help="where log folders are made (default: logs)")
    add("--scale_lr", default=True, help="multiply base_learning_rate by what one step sees (default: true)", **flag)
    add("--gpus", default=argparse.SUPPRESS, metavar="0,1", help='devices "0," or "0,1", or how many (default: CPU)')
    for name, takes_truth in trainer_arguments().items():
        if name not in CONFIGURED_ELSEWHERE:
            extra: dict[str, Any] = {"nargs": "?", "const": True} if takes_truth else {}
            add(f"--{name}", type=scalar, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **extra)
    return parser


def _epilog() -> str:
    import textwrap

    names = " ".join(f"--{name}" for name in trainer_arguments() if name not in CONFIGURED_ELSEWHERE)
    wrapped = textwrap.fill(names, 96, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return (
        "Any configuration value can follow as key.sub=value, e.g. data.params.batch_size=8.\n"
        f"Every argument of Lightning's Trainer is an option, e.g. --max_steps 1000:\n{wrapped}"
    )


def truth(text: str) -> bool:
    """An argument type: yes/true/t/y/1 or no/false/f/n/0, in any case."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f'"{text}" is neither true nor false')


def scalar(text: str) -> Any:
    """An argument type: a number, a truth value, None or a `[list]` where the text is one, else the text."""
    word = text.strip()
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.lower() in ("none", "null"):
        return None
    if word.startswith("[") and word.endswith("]"):
        return [scalar(part) for part in word[1:-1].split(",") if part.strip()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return text
