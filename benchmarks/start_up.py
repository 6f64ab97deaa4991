"""Time the start of commands: help texts, imports, and the packages that a sampling run imports.

python -m benchmarks.start_up --json start_up.json
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.options import make_parser
from ldm.cli.command import command

if TYPE_CHECKING:
    from benchmarks.timing import Report

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "nothing": "pass",
    "torch": "import torch",
    "the modules of sampling": "import ldm.pipelines.run, ldm.pipelines.text, ldm.models.diffusion.ddpm",
    "the modules of training": "import ldm.training.run, ldm.training.assembly",
    "diffusers' networks and scheduler": "from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel",
}
SAMPLING = (
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
SHOWN = 12  # packages with the longest imports


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in the repository root.

    Raises:
        RuntimeError: It failed.
    """
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done


def commands() -> list[str]:
    """Return the paths of all commands, relative to the repository root."""
    return ["main.py", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("scripts/[!_]*.py")))]


def runs(tiny: bool) -> dict[str, Callable[[], object]]:
    """Return the programs to time, by name; each starts a fresh interpreter."""
    help_texts: dict[str, tuple[str, ...]] = {"ldm --help": ("-m", "ldm.cli.main", "--help")}
    help_texts |= {f"{path} --help": (path, "--help") for path in commands()}
    imports: dict[str, tuple[str, ...]] = {f"import {name}": ("-c", code) for name, code in IMPORTS.items()}
    chosen = {**imports, **help_texts}
    if tiny:
        chosen = {name: chosen[name] for name in ("import nothing", "scripts/txt2img.py --help")}
    return {name: partial(python, *words) for name, words in chosen.items()}


def import_times(log: str) -> dict[str, float]:
    """Return the import time of each package's own modules in seconds, the slowest first.

    Args:
        log: output of `python -X importtime`, with lines "import time: self [us] | cumulative | module".
    """
    seconds: dict[str, float] = {}
    for own, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", log, flags=re.M):
        package = module.partition(".")[0]
        seconds[package] = seconds.get(package, 0.0) + int(own) / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def add_times(report: Report, args: argparse.Namespace) -> None:
    """Add a row for each help text and import."""
    import torch

    from benchmarks.timing import contest

    for name, times in contest(runs(args.tiny), args.rounds, torch.device("cpu")).items():
        report.add({"what": name, "median s": f"{statistics.median(times):.2f}"}, times)


def add_imports(report: Report, args: argparse.Namespace) -> None:
    """Add a row for each of the packages with the longest imports in a sampling run."""
    sampling = ("-c", "import json") if args.tiny else (*SAMPLING, "--outdir", args.outdir)
    for package, seconds in list(import_times(python("-X", "importtime", *sampling).stderr).items())[:SHOWN]:
        report.add({"what": f"of a sampling run: importing {package}", "median s": f"{seconds:.2f}"})


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser("start_up", "Time start-up.")
    parser.add_argument(
        "--outdir", metavar="DIR", default="outputs/start_up", help="folder of the sampled image (default: %(default)s)"
    )
    args = parser.parse_args(argv)

    from benchmarks.timing import Report

    report = Report("start_up", args)
    add_times(report, args)
    add_imports(report, args)
    report.finish()


if __name__ == "__main__":
    sys.exit(main())
