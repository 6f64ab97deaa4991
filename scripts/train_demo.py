"""Train a text-to-image model from scratch: first stage, diffusion model, export, images.

python scripts/train_demo.py           a small model, on the CPU in minutes
python scripts/train_demo.py --full    a model of all drawings

Every stage runs a command as a user would type it, and prints it first. The script reads the losses from the logs at
the end. The exit status is 1 unless the loss of every stage fell.
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

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.command import Parser, command, example
from ldm.errors import UserError
from ldm.io.files import reserve_folder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "emoji"
PROMPTS = CONFIGS / "prompts.txt"


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
        name: postfix of the run's folder.
        configs: configurations in `configs/emoji`, merged from left to right.
        loss: logged scalar that must fall.
        starts_from: configuration value that names the checkpoint of the previous stage.
    """

    name: str
    configs: tuple[str, ...]
    loss: str
    starts_from: str | None = None

    @property
    def paths(self) -> list[Path]:
        """Paths of the configurations."""
        return [CONFIGS / name for name in self.configs]


FIRST_STAGE_OF_LDM = "model.params.first_stage_config.params.ckpt_path"
DEMO = (
    Stage("first_stage", ("demo_first_stage.yaml",), "train/rec_loss"),
    Stage("ldm", ("demo_ldm.yaml",), "train/loss_simple", FIRST_STAGE_OF_LDM),
)
CROPS = "autoencoder_kl_16x16x6.yaml"
FULL = (
    Stage("crops", (CROPS,), "train/rec_loss"),
    Stage("whole", (CROPS, "whole_images.yaml"), "train/rec_loss", "model.params.ckpt_path"),
    Stage("f8", ("autoencoder_kl_8x8x16.yaml",), "train/rec_loss", "model.params.ckpt_path"),
    Stage("decoder", ("autoencoder_kl_8x8x16.yaml", "decoder.yaml"), "train/rec_loss", "model.params.ckpt_path"),
    Stage("ldm", ("txt2img_64.yaml",), "train/loss_simple", FIRST_STAGE_OF_LDM),
)


@dataclass(frozen=True)
class Curve:
    """Loss at the start and at the end of training, each the mean of a tenth of the logged values."""

    name: str
    first: float
    last: float

    @property
    def fell(self) -> bool:
        """True if the loss fell; NaN did not."""
        return self.last < self.first

    def __str__(self) -> str:
        return f"{self.name} {'fell' if self.fell else 'DID NOT FALL'}: {self.first:.4f} -> {self.last:.4f}"


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Train a text-to-image model of emoji from scratch, then sample from it.",
        epilog=example("train_demo", "--logdir logs/train-demo"),
    )
    parser.add_argument("--full", action="store_true", help="use all drawings instead of eight: hours on two cores")
    parser.add_argument("--logdir", default="logs/train-demo", metavar="DIR", help="default: %(default)s")
    return parser


def run(title: str, *arguments: str | Path) -> None:
    """Print a command of this repository, and run it.

    Args:
        title: name of the stage.
        *arguments: the script, and its options.

    Raises:
        UserError: The command failed; it printed the reason.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n{title}\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
    if status:
        raise UserError(f"{title} stopped with status {status}; see its message above")


def train(stage: Stage, folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Train one stage under `folder`, and return the folder of its run.

    Raises:
        UserError: The run failed, or left no checkpoint.
    """
    words: list[str | Path] = ["-b", *stage.paths, "-t", "--no-test", "-l", folder, "-n", stage.name, *overrides]
    run(f"train {stage.name}", "main.py", *words)
    runs = sorted(folder.glob(f"*_{stage.name}"))
    if not runs or not checkpoint(runs[-1]).is_file():
        raise UserError(f'training {stage.name} left no checkpoint in "{folder}"')
    return runs[-1]


def checkpoint(run_folder: Path) -> Path:
    """Return the path of the last checkpoint of a run."""
    return run_folder / "checkpoints" / "last.ckpt"


def logged(run_folder: Path, name: str) -> list[float]:
    """Return the values of a scalar in the TensorBoard logs of a run, in the order of their steps.

    Raises:
        UserError: Fewer than two values were logged.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: list[tuple[int, float]] = []
    for folder in sorted({file.parent for file in run_folder.glob("**/events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        # Lightning appends _step to scalars that it logs both by step and by epoch.
        for tag in {name, f"{name}_step"} & set(events.Tags()["scalars"]):
            values += [(event.step, event.value) for event in events.Scalars(tag)]
    if len(values) < 2:
        raise UserError(f'"{run_folder}" has too few logged values of {name}; log at least two')
    return [value for _, value in sorted(values)]


def curve(run_folder: Path, name: str) -> Curve:
    """Return the curve of a loss over a run."""
    values = logged(run_folder, name)
    count = max(1, len(values) // 10)
    return Curve(name, sum(values[:count]) / count, sum(values[-count:]) / count)


def train_and_sample(stages: Sequence[Stage], folder: Path) -> list[Curve]:
    """Run all stages, the export and the sampling under `folder`, and return the loss curves of the stages."""
    runs: list[Path] = []
    for stage in stages:
        overrides = [f"{stage.starts_from}={checkpoint(runs[-1])}"] if stage.starts_from else []
        runs.append(train(stage, folder, overrides))
    model, images = folder / "model", folder / "images"
    run("export", "scripts/export_model.py", "--ckpt", checkpoint(runs[-1]), "--outdir", model)
    options = ["--ddim_steps", "50", "--scale", "3", "--seed", "1"]
    run("sample", "scripts/txt2img.py", "--model", model, "--from-file", PROMPTS, *options, "--outdir", images)
    return [curve(run_folder, stage.loss) for run_folder, stage in zip(runs, stages, strict=True)]


def report(curves: Sequence[Curve], seconds: float) -> bool:
    """Print the curves and the duration; return whether every loss fell."""
    print()
    for each in curves:
        print(each)
    minutes, rest = divmod(round(seconds), 60)
    print(f"training and sampling took {minutes} min {rest} s")
    return all(each.fell for each in curves)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 if a loss did not fall."""
    args = make_parser().parse_args(argv)
    start = time.monotonic()
    folder = reserve_folder(Path(args.logdir) / datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))
    curves = train_and_sample(FULL if args.full else DEMO, folder)
    return 0 if report(curves, time.monotonic() - start) else 1


if __name__ == "__main__":
    sys.exit(main())
