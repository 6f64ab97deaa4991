"""The command `convert_checkpoint`: write the weights of a checkpoint in another format, or in that of diffusers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser, command, example, say
from ldm.cli.diffusers_folder import check_folder, compare_with_source, find_source, write_folder
from ldm.config.model_files import HUB_NAME
from ldm.errors import UserError
from ldm.io.diffusers import files as diffusers_files

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".ckpt")


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Convert the weights of a checkpoint: from .ckpt to .safetensors, or back; or a model to a folder "
        "in the form of diffusers, or back.",
        epilog=example("convert_checkpoint", "last.ckpt model.safetensors --weights ema --half"),
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a checkpoint or a safetensors file, whose name does not matter; or a folder in the form of diffusers; "
        "for a folder DST also the name or folder of a model",
    )
    parser.add_argument(
        "target",
        metavar="DST",
        help=f"file to write; its suffix, {' or '.join(SUFFIXES)}, determines the format; without a suffix, or with a "
        "slash at the end, a folder in the form of diffusers",
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="for a folder DST: configuration of the model in SRC (default: beside it, or recognised from its weights)",
    )
    parser.add_argument(
        "--weights",
        choices=("live", "ema", "both"),
        help="write the live or the averaged weights, or both unchanged; required if the checkpoint holds both",
    )
    parser.add_argument(
        "--half", action="store_true", help="write float16 weights; schedule tables keep their precision"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return parser


def is_folder_name(target: str) -> bool:
    """Return whether DST is a folder: its name has no suffix, or ends in a slash."""
    return target.endswith(("/", os.sep)) or not Path(target).suffix


def is_folder_source(source: str) -> bool:
    """Return whether SRC is a folder in the form of diffusers, or the name of one on the Hugging Face hub."""
    path = Path(source)
    if path.exists() or path.suffix in SUFFIXES:
        return diffusers_files.is_folder(path)
    return HUB_NAME.fullmatch(source) is not None and not path.parent.exists()


def write_config(config: Mapping[str, Any], path: Path, overwrite: bool) -> None:
    """Write the configuration of a model beside its weights."""
    from omegaconf import OmegaConf

    from ldm.io.files import atomic_path

    with atomic_path(path, replace=overwrite) as temporary:
        OmegaConf.save(OmegaConf.create({"model": dict(config)}), temporary)
    say(f"{path}: its configuration")


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raise an error if `target` is not a file to write to.

    Raises:
        UserError: Its suffix is unknown, it is the source, or it exists.
    """
    if target.suffix not in SUFFIXES:
        suffixes = " or ".join(SUFFIXES)
        raise UserError(
            f'"{target}" has no known format; end its name in {suffixes}, or in / for a folder of diffusers'
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f'"{target}" is the source itself; choose another DST')
    if target.exists() and not overwrite:
        raise UserError(f'"{target}" exists; choose another DST, or give --overwrite')


def choose(weights: Mapping[str, Tensor], kind: str | None, source: Path) -> tuple[dict[str, Tensor], str]:
    """Return the requested weights and their kind: "live", "ema" or "both".

    Raises:
        UserError: The checkpoint holds both kinds and `kind` is None, or lacks the requested kind.
    """
    from ldm.io.checkpoint.loading import choose_weights, ema_names

    if kind is None and ema_names(weights):
        raise UserError(
            f'"{source}" holds live and averaged weights; choose --weights ema (to sample), live or both (to train)'
        )
    kind = kind or "live"
    return choose_weights(weights, kind, source), kind


def without_unused(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` without the entries that no model reads, and print their names.

    Averages of the weights of a loss stay: a model that finds an average missing starts all averages from scratch.
    """
    from ldm.io.checkpoint.loading import UNUSED_PREFIXES

    unused = [name for name in weights if name.startswith(UNUSED_PREFIXES)]
    if unused:
        listed = ", ".join(unused[:4]) + (", …" if len(unused) > 4 else "")
        say(f"left out {len(unused)} entries of losses and samplers: {listed}")
    return {name: value for name, value in weights.items() if name not in unused}


def in_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` in float16, except for scalars, top-level entries, and schedule tables, also of inner models."""
    import torch

    from ldm.io.checkpoint.writing import cast
    from ldm.modules.diffusionmodules.schedule import TABLE_NAMES

    def is_weight(name: str, value: Tensor) -> bool:
        _, dot, last = name.rpartition(".")
        return value.is_floating_point() and value.dim() > 0 and bool(dot) and last not in TABLE_NAMES

    return {
        name: cast(name, value, torch.float16, "leave out --half") if is_weight(name, value) else value
        for name, value in weights.items()
    }


def describe(checkpoint: Mapping[str, Any], source: Path, kind: str, half: bool) -> dict[str, Any]:
    """Return metadata about the origin of the weights."""
    from ldm.cli.diffusers_folder import origin

    known = checkpoint.get("metadata")
    known = known if isinstance(known, Mapping) else {}
    step = checkpoint.get("global_step", known.get("step"))
    if kind == "live" and known.get("weights") == "ema":  # averages under the live names
        kind = "ema"
    return {
        **origin(source),
        "weights": kind,
        **({"step": int(step)} if str(step).isdecimal() else {}),
        **({"dtype": "float16"} if half else {}),
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    target = Path(args.target)
    if is_folder_name(args.target):
        files = find_source(args.source, args.config)
        check_folder(target, files, args.overwrite)
        write_folder(files, target, lambda weights: choose(weights, args.weights, files.checkpoint), args.half)
        return
    if args.config is not None:
        raise UserError("--config is for a folder of diffusers; leave it out, or end DST in /")
    source = Path(args.source)
    theirs = find_source(args.source, None) if is_folder_source(args.source) else None
    source = source if theirs is None else theirs.checkpoint
    check_target(source, target, args.overwrite)

    from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict
    from ldm.io.checkpoint.writing import save_checkpoint, save_safetensors

    weights, kind = choose(read_state_dict(source), args.weights, source)
    weights = without_unused(weights)
    metadata = describe({} if theirs else read_checkpoint(source), source, kind, args.half)
    if theirs is not None:
        config, compared = compare_with_source(weights, theirs)
        metadata |= compared
    if args.half:
        weights = in_half(weights)
    save = save_safetensors if target.suffix == ".safetensors" else save_checkpoint
    save(weights, target, metadata, replace=args.overwrite)
    if theirs is not None:
        write_config(config, target.with_suffix(".yaml"), args.overwrite)
    say(f"{target}: {target.stat().st_size / 1e6:.1f} MB, {len(weights)} entries, {metadata['weights']} weights")
