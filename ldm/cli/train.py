"""The command `train`: train a model from YAML configurations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ldm.cli.command import Parser, command, say
from ldm.cli.options import seed, target_options
from ldm.config.overrides import options_with_value, split_overrides
from ldm.errors import UserError, did_you_mean
from ldm.training.options import BOOLEAN_OPTIONS, TRAINER_OPTIONS, check_lightning


def make_parser(**parser_kwargs: Any) -> Parser:
    """Return the parser of the command, with the arguments of Lightning's Trainer as options.

    Args:
        **parser_kwargs: arguments of the parser to replace.
    """
    defaults: dict[str, Any] = {
        "description": "Train a model from YAML configurations.",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "epilog": _epilog(),
        "allow_abbrev": False,
        "parents": [target_options()],
    }
    parser = Parser(**{**defaults, **parser_kwargs})
    flag: dict[str, Any] = {"nargs": "?", "const": True, "type": boolean, "metavar": "BOOL"}
    add = parser.add_argument
    add("-n", "--name", nargs="?", const="", default="", help="name of the run (default: that of the first --base)")
    add("-r", "--resume", default="", metavar="PATH", help="log folder or checkpoint to resume from")
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="configurations, merged from left to right")
    add("-t", "--train", default=False, help="train", **flag)
    add("--no-test", default=False, help="skip the test after training", **flag)
    about_plan = "print the parameters, the memory, the time of a step and the largest batch; write nothing"
    add("--plan", action="store_true", help=about_plan)
    add("-p", "--project", help="accepted for compatibility; has no effect")
    add("-d", "--debug", default=False, help="debug after an error; move the log folder to debug_runs/", **flag)
    add("-s", "--seed", type=seed, help="seed of all random numbers (default: 23, or that of the resumed run)")
    add("-f", "--postfix", default="", help="text to append to the log folder's name")
    add("-l", "--logdir", default="logs", help="parent of the log folders (default: logs)")
    scaling = "multiply base_learning_rate by the items of a step (default: true, or as in the resumed run)"
    add("--scale_lr", default=None, help=scaling, **flag)
    add("--gpus", default=argparse.SUPPRESS, metavar="0,1", help='devices "0," or "0,1", or a count (default: CPU)')
    loggers = '"tensorboard" (default), "csv" or "wandb", several with commas, or "false"'
    add("--logger", type=scalar, default=argparse.SUPPRESS, metavar="NAME", help=loggers)
    for name in TRAINER_OPTIONS:
        extra: dict[str, Any] = {"nargs": "?", "const": True} if name in BOOLEAN_OPTIONS else {}
        add(f"--{name}", type=scalar, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **extra)
    return parser


def _epilog() -> str:
    import textwrap

    names = " ".join(f"--{name}" for name in TRAINER_OPTIONS)
    wrapped = textwrap.fill(names, 96, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return (
        "Override any configuration value with key.sub=value, e.g. data.params.batch_size=8.\n"
        f"Arguments of Lightning's Trainer are options, e.g. --max_steps 1000:\n{wrapped}"
    )


def boolean(text: str) -> bool:
    """Argument type: yes/true/t/y/1 or no/false/f/n/0, in any case."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f'"{text}" is neither true nor false')


def scalar(text: str) -> Any:
    """Argument type: a number, a boolean, None, a `[list]` of these, or text."""
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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Returns:
        The options, with `overrides`, the words `key.sub=value`, and `trainer`, the arguments of Lightning's Trainer.

    Raises:
        UserError: a word is neither an option nor an override, or options contradict each other.
    """
    parser = make_parser()
    value_options = {*options_with_value(parser), "-n", "--name"}
    overrides, words = split_overrides(sys.argv[1:] if argv is None else argv, value_options)
    args, unknown = parser.parse_known_args(words)
    for word in unknown:
        if word.startswith("-"):
            name = word.split("=")[0]
            known = [*parser._option_string_actions]
            raise UserError(f"there is no option {name}{did_you_mean(name, known)}; see {parser.prog} --help")
        if "=" not in word:
            raise UserError(f'"{word}" is neither an option nor key.sub=value; give configurations after --base')
    args.overrides = [*overrides, *unknown]
    names = (*TRAINER_OPTIONS, "gpus", "logger")
    args.trainer = {name: value for name, value in vars(args).items() if name in names}
    if args.name and args.resume:
        raise UserError("-n/--name and -r/--resume cannot be combined; rename a resumed run with -f/--postfix")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, check the configuration, and train.

    Raises:
        UserError: an option or the configuration is wrong; nothing has been written.
    """
    args = parse(argv)
    check_lightning()
    from ldm.training.configuration import make_plan

    args.train = args.train or args.plan
    plan = make_plan(args)
    if args.plan:
        from ldm.training.forecast import forecast
        from ldm.training.forecast_text import forecast_text

        say(forecast_text(forecast(plan)))
        return
    from ldm.training.run import run

    run(plan)
