"""Options that commands share, and the types of their values."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ldm.config import targets

MAX_COUNT = 10**7  # of pictures, steps and the like
MAX_SIDE = 2**16  # of a picture, in pixels
PRECISIONS = ("float32", "bfloat16", "float16", "auto")
MAX_SEED = 2**63 - 1


def positive_int(text: str) -> int:
    """An argument type: a whole number from 1 to ten million."""
    return _whole_number(text, 1, MAX_COUNT)


def image_side(text: str) -> int:
    """An argument type: the pixels of a picture's side, from 1 to 65,536."""
    return _whole_number(text, 1, MAX_SIDE)


def non_negative_int(text: str) -> int:
    """An argument type: a whole number from 0 to ten million."""
    return _whole_number(text, 0, MAX_COUNT)


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


def model_options(places: str = "models/ldm") -> argparse.ArgumentParser:
    """The parent parser with the options of every command that loads a model; `--model` names a folder in `places`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[target_options()])
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="NAME", help=f"a folder under {places}, or any folder with config.yaml and weights"
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
        help="numbers the network computes in; auto: bfloat16 where the hardware has it (default: %(default)s)",
    )
    return parser


def run_options(outdir: str) -> argparse.ArgumentParser:
    """The parent parser with the options of every command that draws pictures into a folder."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--outdir", metavar="DIR", default=outdir, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=seed, metavar="N", help="picture i is drawn from the seed N + i (default: drawn anew)"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, metavar="N", help="pictures at once; changes them by rounding only"
    )
    parser.add_argument("--skip_grid", action="store_true", help="write the single pictures only")
    return parser
