"""Train a text-to-image model from nothing: first stage, diffusion model, export, pictures.

python scripts/train_demo.py           a small one, on the CPU in minutes
python scripts/train_demo.py --full    one of all the drawings

Each stage is the command that one would type; it is shown before it runs. The two losses are read back from the logs
at the end, and the exit status is 1 unless both fell.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import Parser, command
from ldm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "emoji"
PROMPTS = CONFIGS / "prompts.txt"


@dataclass(frozen=True)
class Stage:
    """One training run."""

    name: str
    configs: tuple[str, ...]  # merged from left to right
    loss: str  # the scalar that shows whether it learns
    starts_from: str | None = None  # the configuration value that takes the checkpoint of the stage before

    @property
    def paths(self) -> list[Path]:
        """Where its configurations are."""
        return [CONFIGS / name for name in self.configs]


FIRST_STAGE_OF_LDM = "model.params.first_stage_config.params.ckpt_path"
DEMO = (
    Stage("first_stage", ("demo_first_stage.yaml",), "train/rec_loss"),
    Stage("ldm", ("demo_ldm.yaml",), "train/loss_simple", FIRST_STAGE_OF_LDM),
)
CROPS = "autoencoder_kl_16x16x6.yaml"
FULL = (
    Stage("crops", (CROPS,), "train/rec_loss"),
    Stage("whole", (CROPS, "whole_pictures.yaml"), "train/rec_loss", "model.params.ckpt_path"),
    Stage("f8", ("autoencoder_kl_8x8x16.yaml",), "train/rec_loss", "model.params.ckpt_path"),
    Stage("decoder", ("autoencoder_kl_8x8x16.yaml", "decoder.yaml"), "train/rec_loss", "model.params.ckpt_path"),
    Stage("ldm", ("txt2img_64.yaml",), "train/loss_simple", FIRST_STAGE_OF_LDM),
)


@dataclass(frozen=True)
class Curve:
    """A loss at the start and at the end of training, each the mean of a tenth of the logged values."""

    name: str
    first: float
    last: float

    @property
    def fell(self) -> bool:
        """Whether training lowered it; NaN did not fall."""
        return self.last < self.first

    def __str__(self) -> str:
        return f"{self.name} {'fell' if self.fell else 'DID NOT FALL'}: {self.first:.4f} -> {self.last:.4f}"


def make_parser() -> Parser:
    """The options."""
    parser = Parser(description="Train a text-to-image model of emoji from nothing, then draw with it.")
    parser.add_argument("--full", action="store_true", help="all the drawings instead of eight: hours on two cores")
    parser.add_argument("--logdir", default="logs/train-demo", metavar="DIR", help="default: %(default)s")
    return parser


def run(title: str, *arguments: str | Path) -> None:
    """Run a command of this repository with its output visible.

    Raises:
        UserError: it failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n{title}\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
    if status:
        raise UserError(f"{title} stopped with status {status}; its message stands above")


def train(stage: Stage, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Train one stage under `folder`; returns the folder of its run."""
    words = ["-b", *stage.paths, "-t", "--no-test", "-l", folder, "-n", stage.name, *overrides]
    run(f"train {stage.name}", "main.py", *words)
    runs = sorted(folder.glob(f"*_{stage.name}"))
    if not runs or not checkpoint(runs[-1]).is_file():
        raise UserError(f'training {stage.name} left no checkpoint in "{folder}"')
    return runs[-1]


def checkpoint(run_folder: Path) -> Path:
    """Where a run leaves its last checkpoint."""
    return run_folder / "checkpoints" / "last.ckpt"


def logged(run_folder: Path, name: str) -> list[float]:
    """The values of a scalar in a run's TensorBoard logs, in the order of their steps.

    Raises:
        UserError: it was never logged.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: list[tuple[int, float]] = []
    for folder in sorted({file.parent for file in run_folder.glob("**/events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        # Lightning appends _step to what it logs both by step and by epoch.
        for tag in {name, f"{name}_step"} & set(events.Tags()["scalars"]):
            values += [(event.step, event.value) for event in events.Scalars(tag)]
    if len(values) < 2:
        raise UserError(f'"{run_folder}" has too few logged values of {name} to tell whether it fell')
    return [value for _, value in sorted(values)]


def curve(run_folder: Path, name: str) -> Curve:
    """How a loss went over a run."""
    values = logged(run_folder, name)
    count = max(1, len(values) // 10)
    return Curve(name, sum(values[:count]) / count, sum(values[-count:]) / count)


def train_and_draw(stages: Sequence[Stage], folder: Path) -> list[Curve]:
    """The whole chain under `folder`; returns the loss curves of the stages."""
    runs: list[Path] = []
    for stage in stages:
        overrides = [f"{stage.starts_from}={checkpoint(runs[-1])}"] if stage.starts_from else []
        runs.append(train(stage, folder, overrides))
    model, pictures = folder / "model", folder / "pictures"
    run("export", "scripts/export_model.py", "--ckpt", checkpoint(runs[-1]), "--outdir", model)
    options = ["--from-file", PROMPTS, "--ddim_steps", "50", "--scale", "3", "--seed", "1", "--outdir", pictures]
    run("draw", "scripts/txt2img.py", "--model", model, *options)
    return [curve(run_folder, stage.loss) for run_folder, stage in zip(runs, stages, strict=True)]


def report(curves: Sequence[Curve], seconds: float) -> bool:
    """Say how it went; True when every loss fell."""
    print()
    for each in curves:
        print(each)
    minutes, rest = divmod(round(seconds), 60)
    print(f"trained and drew in {minutes} min {rest} s")
    return all(each.fell for each in curves)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = make_parser().parse_args(argv)
    start = time.monotonic()
    folder = Path(args.logdir) / datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if not report(train_and_draw(FULL if args.full else DEMO, folder), time.monotonic() - start):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
