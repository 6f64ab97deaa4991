"""Options that commands share, and the types of their values. Each block of options is declared here once."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.config import targets
from ldm.config.assets import locate
from ldm.config.values import PRECISIONS, PUBLISHED_PRECISIONS, SEED_RANGE, TIMESTEP_SPACINGS

MAX_COUNT = 10**7  # of images, steps and the like
MAX_SIDE = 2**16  # of an image, in pixels
MAX_SEED = SEED_RANGE - 1
EMBEDDING_SUFFIXES = (".pt", ".bin", ".safetensors", ".ckpt")

# -- types of values ---------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parse a whole number from 1 to ten million."""
    return _whole_number(text, 1, MAX_COUNT)


def image_side(text: str) -> int:
    """Parse the side of an image in pixels, from 1 to 65,536."""
    return _whole_number(text, 1, MAX_SIDE)


def non_negative_int(text: str) -> int:
    """Parse a whole number from 0 to ten million."""
    return _whole_number(text, 0, MAX_COUNT)


def seed(text: str) -> int:
    """Parse a whole number from 0 to 2⁶³ - 1."""
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
    """Parse a number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number') from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def lora(text: str) -> tuple[str, float]:
    """Parse the file of a LoRA, and its factor after a colon, by default 1."""
    file, colon, factor = text.rpartition(":")
    try:
        return (file, finite_float(factor)) if colon and file else (text, 1.0)
    except argparse.ArgumentTypeError:
        if locate(file).is_file() and not locate(text).is_file():
            raise argparse.ArgumentTypeError(
                f'"{factor}" after "{file}:" is not a factor; give a number such as 0.8'
            ) from None
        return text, 1.0  # the colon is a part of the name


def embedding(text: str) -> tuple[str, str | None]:
    """Parse the file of a textual inversion, and its token after a colon, by default None."""
    match = re.fullmatch(r"(.+):([^/\\:]+)", text)
    if match is None or match[2].endswith(EMBEDDING_SUFFIXES):  # the colon is a part of the name
        return text, None
    return match[1], match[2]


def share(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    value = finite_float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def precision(text: str) -> str:
    """Return the name of a precision for one of its published names."""
    return PUBLISHED_PRECISIONS.get(text, text)


# -- parent parsers ----------------------------------------------------------------------------------------------


class _AllowTarget(argparse.Action):
    """Action that allows a target as soon as it is parsed; code that builds nested configurations sees no options."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            targets.allow(values)
        except ValueError as error:
            parser.error(f"{option_string}: {error}")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def target_options() -> argparse.ArgumentParser:
    """Return the parent parser of every command that builds the classes that a configuration names."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--allow-target",
        action=_AllowTarget,
        metavar="PREFIX",
        help="also build classes that the configuration names under this dotted prefix, e.g. mydata; repeatable",
    )
    return parser


def model_options(places: str = "models/ldm") -> argparse.ArgumentParser:
    """Return the parent parser of every command that loads a model; `--model` names a folder in `places`."""
    parser = argparse.ArgumentParser(add_help=False, parents=[target_options()])
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"a folder under {places}, any folder with config.yaml and weights or in the form of diffusers, or the "
        "name of one on the Hugging Face hub",
    )
    group.add_argument(
        "--config",
        metavar="YAML",
        help="configuration of the model (default: config.yaml beside --ckpt, or recognised from weights of Stable "
        "Diffusion)",
    )
    group.add_argument("--ckpt", metavar="FILE", help="weights of the model: a checkpoint or a safetensors file")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps, … (default: cuda or mps if available, else cpu)")
    group.add_argument(
        "--precision",
        type=precision,
        choices=PRECISIONS,
        default="float32",
        help="dtype of the network; auto: bfloat16 if the hardware computes in it; also full for float32 and autocast "
        "for auto, as published (default: %(default)s)",
    )
    return parser


def addition_options() -> argparse.ArgumentParser:
    """Return the parent parser of every command that samples: weights to add to those of the model."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("additions to the model")
    group.add_argument(
        "--vae", metavar="FILE", help="weights of a first stage, e.g. a fine-tuned one, that replace those of the model"
    )
    group.add_argument(
        "--lora",
        type=lora,
        action="append",
        default=[],
        metavar="FILE[:FACTOR]",
        help="merge this LoRA into the weights, e.g. style.safetensors:0.8; repeatable (default factor: 1)",
    )
    group.add_argument(
        "--embedding",
        type=embedding,
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="use the vectors of this textual inversion for its token in prompts, e.g. cat.pt:<my-cat>; repeatable "
        "(default token: that in the file)",
    )
    return parser


def run_options(outdir: str) -> argparse.ArgumentParser:
    """Return the parent parser of every command that writes sampled images to a folder."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--outdir", metavar="DIR", default=outdir, help="default: %(default)s")
    add_seed(parser)
    parser.add_argument(
        "--batch_size", type=positive_int, metavar="N", help="images sampled at once; changes them only by rounding"
    )
    parser.add_argument("--skip_grid", action="store_true", help="write the single images only")
    return parser


# -- blocks of options -------------------------------------------------------------------------------------------


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add the seed of the first image."""
    parser.add_argument("--seed", type=seed, metavar="N", help="image i uses the seed N + i (default: random)")


def add_count(parser: argparse.ArgumentParser, option: str, default: int | None, what: str, *flags: str) -> None:
    """Add a number of images, rounds or the like, at least 1; without `default` that of the model applies."""
    shown = "that of the model" if default is None else default
    parser.add_argument(
        *flags, option, type=positive_int, default=default, metavar="N", help=f"{what} (default: {shown})"
    )


def add_size(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the height and width of images; `default` describes what applies without them."""
    parser.add_argument("--H", type=image_side, metavar="PIXELS", help=f"height (default: {default})")
    parser.add_argument("--W", type=image_side, metavar="PIXELS", help=f"width (default: {default})")


def add_prompts(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add a prompt, or a file of prompts; without `default` an example that suits the model is the prompt."""
    shown = "an example that suits the model" if default is None else f'"{default}"'
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", default=default, help=f"text to sample from (default: {shown})")
    text.add_argument("--from-file", metavar="FILE", help="sample each line of a text file; blank lines are skipped")


def add_sampler(
    parser: argparse.ArgumentParser,
    steps: int,
    *,
    scale: float | None = None,
    eta: float = 0.0,
    steps_flags: Sequence[str] = ("--steps",),
    eta_flags: Sequence[str] = ("--eta",),
    by_model: Mapping[str, str] | None = None,
) -> Any:
    """Add the sampler, its steps, grid and eta, and with `scale` the guidance scale; return the group of samplers.

    Without its option eta is None; `sampler_settings` then uses `eta` for DDIM and 0 for the other samplers. The same
    holds for the steps and the scale if their default depends on the model.

    Args:
        parser: gets the options.
        steps, scale, eta: the defaults.
        steps_flags, eta_flags: names of the options.
        by_model: for settings whose default depends on the model, what the help adds, such as "50 for other models".
    """
    also = {name: f", or {text}" for name, text in (by_model or {}).items()}
    parser.add_argument(
        *steps_flags,
        dest="steps",
        type=positive_int,
        default=None if "steps" in also else steps,
        metavar="N",
        help=f"default: {steps}{also.get('steps', '')}",
    )
    group = parser.add_mutually_exclusive_group()
    for flags, text in (
        (("--plms",), "sample with PLMS instead of DDIM"),
        (("--dpm", "--dpm_solver"), f"sample with DPM-Solver++, for which 20 {steps_flags[-1]} are enough"),
    ):
        name = flags[0].removeprefix("--")
        group.add_argument(*flags, dest="sampler", action="store_const", const=name, help=text)
    parser.set_defaults(sampler="ddim", sampler_defaults={"steps": steps, "eta": eta, "scale": scale})
    parser.add_argument(
        *eta_flags,
        dest="eta",
        type=non_negative_float,
        metavar="ETA",
        help=f"noise of DDIM steps; 0 is deterministic, 1 is as DDPM (default: {eta:g} for DDIM{also.get('eta', '')})",
    )
    parser.add_argument(
        "--timestep_spacing",
        choices=TIMESTEP_SPACINGS,
        help="grid of the timesteps; trailing ends at the last one, for zero terminal SNR (default: that of the model, "
        "or else exact, with --dpm logsnr)",
    )
    if scale is not None:
        parser.add_argument(
            "--scale",
            type=finite_float,
            default=None if "scale" in also else scale,
            help=f"guidance scale; 1 is none (default: {scale}{also.get('scale', '')})",
        )
    return group


def sampler_settings(args: argparse.Namespace, of_model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings of the sampler that the options of `add_sampler` select.

    Args:
        args: the parsed options.
        of_model: the model's own defaults, instead of those of `add_sampler`.
    """
    defaults = {**args.sampler_defaults, **(of_model or {})}
    given = {name: getattr(args, name, None) for name in ("steps", "eta", "scale")}
    if args.sampler != "ddim":
        defaults["eta"] = 0.0
    chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
    settings = {"sampler": args.sampler, "steps": chosen["steps"], "eta": chosen["eta"]}
    if args.timestep_spacing is not None:
        settings["timestep_spacing"] = args.timestep_spacing
    return {**settings, "scale": chosen["scale"]} if hasattr(args, "scale") else settings
