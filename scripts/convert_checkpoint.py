"""Write a checkpoint's weights in the other format: .ckpt to .safetensors, or back.

python scripts/convert_checkpoint.py models/ldm/cin256-v2/model.ckpt models/ldm/cin256-v2/model.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.errors import UserError
from ldm.io.files import sha256

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".ckpt")


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        description="Write a checkpoint's weights in the other format: .ckpt to .safetensors, or back.",
        epilog="example:\n  python scripts/convert_checkpoint.py last.ckpt model.safetensors --weights ema --half",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint or a safetensors file, whatever its name")
    parser.add_argument("target", metavar="DST", help=f"where to write; {' or '.join(SUFFIXES)} says in which format")
    parser.add_argument(
        "--weights",
        choices=("live", "ema", "both"),
        help="as trained, averaged, or both as they are; needed where the checkpoint holds both",
    )
    parser.add_argument("--half", action="store_true", help="in float16; schedule tables keep their precision")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return parser


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse to write where it cannot be meant."""
    if target.suffix not in SUFFIXES:
        raise UserError(f'"{target}" says no format; end its name in {" or ".join(SUFFIXES)}')
    if target.exists() and source.exists() and target.samefile(source):
        raise UserError(f'"{target}" is the source itself; choose another place to write to')
    if target.exists() and not overwrite:
        raise UserError(f'"{target}" exists; choose another place to write to, or give --overwrite')


def choose(weights: Mapping[str, Tensor], kind: str | None, source: Path) -> tuple[dict[str, Tensor], str]:
    """The weights asked for, and which they are."""
    from ldm.io.checkpoint.loading import choose_weights, ema_names

    if kind is None and ema_names(weights):
        raise UserError(
            f'"{source}" holds live and averaged weights; choose with --weights ema (to draw), live or both (to train)'
        )
    kind = kind or "live"
    return choose_weights(weights, kind, source), kind


def without_strays(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without what no model reads back, told by name.

    Averages of a loss's weights stay: a model that finds an average missing starts all of them anew.
    """
    from ldm.io.checkpoint.loading import STRAY_PREFIXES

    strays = [name for name in weights if name.startswith(STRAY_PREFIXES)]
    if strays:
        listed = ", ".join(strays[:4]) + (", …" if len(strays) > 4 else "")
        print(f"left out {len(strays)} entries of losses and samplers: {listed}")
    return {name: value for name, value in weights.items() if name not in strays}


def in_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` in float16, save single numbers, what has no dot in its name, and schedules, also of models within."""
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
    """Where the weights come from, as metadata."""
    known = checkpoint.get("metadata")
    known = known if isinstance(known, Mapping) else {}
    step = checkpoint.get("global_step", known.get("step"))
    if kind == "live" and known.get("weights") == "ema":  # averages that were written under the live names
        kind = "ema"
    return {
        "source_sha256": sha256(source),
        "weights": kind,
        **({"step": int(step)} if str(step).isdecimal() else {}),
        **({"dtype": "float16"} if half else {}),
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    source, target = Path(args.source), Path(args.target)
    check_target(source, target, args.overwrite)

    from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict
    from ldm.io.checkpoint.writing import save_checkpoint, save_safetensors

    weights, kind = choose(read_state_dict(source), args.weights, source)
    weights = without_strays(weights)
    if args.half:
        weights = in_half(weights)
    metadata = describe(read_checkpoint(source), source, kind, args.half)
    if target.suffix == ".safetensors":
        save_safetensors(weights, target, metadata)
    else:
        save_checkpoint(weights, target, metadata)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, {len(weights)} entries, {metadata['weights']} weights")


if __name__ == "__main__":
    sys.exit(main())
