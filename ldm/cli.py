"""What the commands share before any heavy import: options, their checks, and how a command ends."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ldm import targets
from ldm.util import UserError, did_you_mean

PRECISIONS = ("float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, and guesses what was meant."""

    def error(self, message: str) -> NoReturn:
        """Print `error: …` and exit with status 2."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            word = message.removeprefix(prefix).split("=")[0].split(" ")[0]
            message += did_you_mean(word, self._option_string_actions)
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], int]:
    """Make `main(argv)` return an exit status: 2 with one line on stderr for a user's mistake, 130 when interrupted."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _log_to_stderr()
        try:
            with targets.allowing():  # what --allow-target adds ends with the command
                main(argv)
        except UserError as error:
            return _fail(f"error: {error}", 2)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except RuntimeError as error:
            # torch's on a GPU, whose class cannot be named without importing torch; and its allocator's on the CPU
            if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
                raise
            return _fail("error: out of memory; use a smaller batch or smaller pictures", 2)
        return 0

    return wrapped


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ldm").setLevel(logging.INFO)


def positive_int(text: str) -> int:
    """An argument type: a whole number of at least 1."""
    return _whole_number(text, 1, MAX_SEED)


def seed(text: str) -> int:
    """An argument type: a whole number from 0 to 2⁶³ - 1."""
    return _whole_number(text, 0, MAX_SEED)


def _whole_number(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a whole number') from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return value


def finite_float(text: str) -> float:
    """An argument type: a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number') from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def non_negative_float(text: str) -> float:
    """An argument type: a finite number of at least 0."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


class _AllowTarget(argparse.Action):
    """Takes effect as it is read: models are built at the end of chains of configurations that no option reaches."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            targets.allow(values)
        except ValueError as error:
            parser.error(f"{option_string}: {error}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def target_options() -> argparse.ArgumentParser:
    """The parent parser with the option of every command that builds what a configuration names."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--allow-target",
        action=_AllowTarget,
        metavar="PREFIX",
        help="also build classes that the configuration names under this dotted prefix, e.g. mydata; repeatable",
    )
    return parser


def model_options() -> argparse.ArgumentParser:
    """The parent parser with the options of every command that loads a model."""
    parser = argparse.ArgumentParser(add_help=False, parents=[target_options()])
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="NAME", help="a folder under models/ldm, or any folder with config.yaml and weights"
    )
    group.add_argument(
        "--config", metavar="YAML", help="the model's configuration (default: config.yaml beside --ckpt)"
    )
    group.add_argument("--ckpt", metavar="FILE", help="the model's weights: a checkpoint or a safetensors file")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda or mps where there is one, else cpu)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="numbers the network computes in (default: %(default)s)",
    )
    return parser
