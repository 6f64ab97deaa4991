"""Train the small twins of the paper's tasks on emoji scenes, and measure each of them.

python scripts/train_twins.py                  every twin: an hour each, at most
python scripts/train_twins.py layout semantic  some of them

Every stage runs a command as a user would type it, and prints it first. The scores of each twin are in TASK.json and a
sheet of its samples in TASK.png, below the folder of the runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import _checkout  # noqa: F401 (imports the code beside this script)
from train_demo import Stage, checkpoint, curve, run, train

from ldm.cli.command import Parser, command, example, say
from ldm.cli.options import positive_int
from ldm.errors import UserError, did_you_mean
from ldm.io.files import reserve_folder


@dataclass(frozen=True)
class Twin:
    """Twin of a task.

    Attributes:
        config: its configuration in `configs/emoji`.
        script: the script that measures it, with its options.
    """

    config: str
    script: tuple[str, ...] = ("evaluate_scenes.py",)


TWINS = {
    "unconditional": Twin("scenes_unconditional.yaml"),
    "class": Twin("scenes_class.yaml"),
    "layout": Twin("scenes_layout.yaml"),
    "semantic": Twin("scenes_semantic.yaml"),
    **{
        task: Twin(f"scenes_{task}.yaml", ("evaluate_restoration.py", "--data", f"configs/emoji/scenes_{task}.yaml"))
        for task in ("superres", "superres_bsr", "inpaint")
    },
    "retrieval": Twin("drawings_retrieval.yaml"),
}


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Train the small twins of the paper's tasks on emoji scenes, and measure each of them.",
        epilog=example("train_twins", "layout --minutes 60"),
    )
    parser.add_argument(
        "tasks",
        nargs="*",
        metavar="TASK",
        help=f"of {', '.join(TWINS)} (default: all); or an override of the configurations, key.sub=value",
    )
    parser.add_argument("--logdir", default="logs/twins", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=positive_int, default=60, help="longest training of each twin (default: %(default)s)"
    )
    parser.add_argument("--max_steps", type=positive_int, help="steps of each twin (default: as configured)")
    parser.add_argument("--n", type=positive_int, default=200, help="samples to measure (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=50, help="DDIM steps of a sample (default: %(default)s)")
    return parser


def train_twin(task: str, folder: Path, options: Sequence[str]) -> Path:
    """Train the twin of a task under `folder`, and return the folder of its run."""
    return train(Stage(task, (TWINS[task].config,), "train/loss_simple"), folder, options)


def measure(task: str, run_folder: Path, folder: Path, options: Sequence[str]) -> Path:
    """Measure a trained twin, and return the file of its scores.

    Raises:
        UserError: The run has no configuration, or the measurement failed.
    """
    configs = sorted((run_folder / "configs").glob("*-project.yaml"))
    if not configs:
        raise UserError(f'the run "{run_folder}" has no configuration')
    script, *rest = TWINS[task].script
    scores = folder / f"{task}.json"
    model: list[str | Path] = ["--config", configs[-1], "--ckpt", checkpoint(run_folder)]
    files: list[str | Path] = ["--json", scores, "--grid", folder / f"{task}.png"]
    run(f"measure {task}", f"scripts/{script}", *model, *rest, *options, *files)
    return scores


def figure(path: Path) -> str:
    """Return the most important score of a file of scores, and the row to compare it with."""
    rows = json.loads(path.read_text(encoding="utf-8"))["scores"]
    if "psnr" in rows[0]:
        *others, model = rows
        compared = ", ".join(f"{row['method']} {row['psnr']:.1f} dB" for row in others)
        return f"{model['psnr']:.1f} dB ({compared})"
    main, *others = (f"{row['images']} {row['value']:.3g} {row['unit']}".strip() for row in rows)
    return f"{main} ({', '.join(others)})"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_intermixed_args(argv)
    overrides = [word for word in args.tasks if "=" in word or word.startswith("~")]
    tasks = [word for word in args.tasks if word not in overrides]
    for task in tasks:
        if task not in TWINS:
            raise UserError(f'there is no twin "{task}"{did_you_mean(task, TWINS)}; choose one of {", ".join(TWINS)}')
    folder = reserve_folder(Path(args.logdir) / datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))
    hours, minutes = divmod(args.minutes, 60)
    options = ["--max_time", f"{hours // 24:02}:{hours % 24:02}:{minutes:02}:00"]
    options += ["--max_steps", str(args.max_steps)] if args.max_steps else []
    options += overrides
    lines = []
    for task in tasks or TWINS:
        run_folder = train_twin(task, folder, options)
        scores = measure(task, run_folder, folder, ["--n", str(args.n), "--steps", str(args.steps)])
        lines.append(f"{task}: {curve(run_folder, 'train/loss_simple')}; {figure(scores)}")
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
