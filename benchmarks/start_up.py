"""Time what passes before the first step: help texts, imports, and which packages a sampling run imports.

python benchmarks/start_up.py --json start_up.json
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from benchmarks.options import make_parser
from ldm.cli.command import command

if TYPE_CHECKING:  # torch takes seconds to import; mistakes are told before
    from benchmarks.timing import Report

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "nothing": "pass",
    "torch": "import torch",
    "what sampling imports": "import ldm.inference, ldm.models.diffusion.ddpm, ldm.models.diffusion.ddim",
    "what training imports": "import ldm.training.run, ldm.training.assembly",
    "diffusers' networks and scheduler": "from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel",
}
DRAWING = (
    "scripts/txt2img.py",
    "--model",
    "emoji64",
    "--prompt",
    "rocket",
    "--n_samples",
    "1",
    "--ddim_steps",
    "1",
    "--skip_grid",
)
SHOWN = 12  # packages that take the longest


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter at the repository's root."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done


def commands() -> list[str]:
    """Every command, as a path from the repository's root."""
    return ["main.py", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("scripts/*.py")))]


def runs(tiny: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name: a fresh interpreter each."""
    help_texts = {f"{path} --help": (path, "--help") for path in commands()}
    imports = {f"import {name}": ("-c", code) for name, code in IMPORTS.items()}
    chosen = {**imports, **help_texts}
    if tiny:
        chosen = {name: chosen[name] for name in ("import nothing", "scripts/txt2img.py --help")}
    return {name: lambda words=words: python(*words) for name, words in chosen.items()}


def import_times(log: str) -> dict[str, float]:
    """Seconds that each package's own modules took, from what `python -X importtime` logs; the slowest first.

    A line is "import time: self [us] | cumulative | module".
    """
    seconds: dict[str, float] = {}
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", log, flags=re.M):
        package = module.partition(".")[0]
        seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def add_times(report: Report, args: argparse.Namespace) -> None:
    """A row for each help text and import."""
    import torch

    from benchmarks.timing import contest

    for name, times in contest(runs(args.tiny), args.rounds, torch.device("cpu")).items():
        report.add({"what": name, "median s": f"{statistics.median(times):.2f}"}, times)


def add_imports(report: Report, args: argparse.Namespace) -> None:
    """A row for each of the packages that a sampling run spends the longest importing."""
    drawing = ("-c", "import json") if args.tiny else (*DRAWING, "--outdir", args.outdir)
    for package, seconds in list(import_times(python("-X", "importtime", *drawing).stderr).items())[:SHOWN]:
        report.add({"what": f"of a sampling run: importing {package}", "median s": f"{seconds:.2f}"})


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("Time start-up.")
    parser.add_argument(
        "--outdir", metavar="DIR", default="outputs/start_up", help="where the run draws to (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    from benchmarks.timing import Report

    report = Report("start_up", args)
    add_times(report, args)
    add_imports(report, args)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
