"""The command `prepare`: from a folder of images to lists, a vocabulary and configurations that train on them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.command import Parser, command, example, program_of, say
from ldm.cli.options import finite_float, image_side, positive_int, target_options
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.preparation.machine import Machine
    from ldm.preparation.preparation import Options, Preparation

TASKS = ("text", "class", "unconditional", "inpainting", "superres")
PREPARED = "prepared"  # parent of the default folder of the results
EXAMPLES, SAMPLES = "examples", "samples"
MOST_CLASSES = 4  # that the command of samples names


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        description="Prepare a folder of images for training: inspect the images, and write lists, a vocabulary and "
        "configurations. It prints the commands that train a first stage, train a model, and sample.",
        epilog=example("prepare_data", "photos --task text"),
        parents=[target_options()],
    )
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of the images, with any folders inside")
    add("--task", required=True, choices=TASKS, help="what the model is conditioned on")
    add("--size", type=image_side, metavar="PIXELS", help="side of the images (default: by their sizes)")
    add("--outdir", metavar="DIR", help=f"folder of the results (default: {PREPARED}/<name of the folder>-<task>)")
    add("--force", action="store_true", help="replace the files in an existing --outdir; training runs stay")
    add("--inspect", action="store_true", help="only report what the images and captions are like; write nothing")
    _add_sources(parser)
    _add_networks(parser)
    return parser


def _add_sources(parser: Parser) -> None:
    add = parser.add_argument_group("images, captions and classes").add_argument
    add(
        "--table",
        metavar="FILE",
        help="CSV, TSV, JSON Lines or Parquet with the column path, or a text file with one path a line; paths are "
        "relative to DIR (default: all images below DIR)",
    )
    add(
        "--captions",
        metavar="SOURCE",
        help="txt for text files beside the images, name for the words of the file names, or a column of the table "
        "(default: the column caption or text, else txt)",
    )
    add(
        "--labels",
        metavar="SOURCE",
        help="folder for the names of the folders, or a column of the table (default: the column label or class, else "
        "folder)",
    )
    add(
        "--val-fraction",
        type=_fraction,
        default=0.05,
        metavar="SHARE",
        help="share of the images for validation, which training does not use (default: %(default)s)",
    )
    add(
        "--vocab",
        metavar="NAME",
        help="vocabulary of the captions: a vocab.txt, or a name on the Hugging Face hub such as bert-base-uncased "
        "(default: built from the captions)",
    )
    add(
        "--degradation",
        default="pil_bicubic",
        metavar="NAME",
        help="of the small images for superres, such as bsrgan_light (default: %(default)s)",
    )


def _add_networks(parser: Parser) -> None:
    add = parser.add_argument_group("networks and training").add_argument
    add("--first-stage", metavar="MODEL", help="fine-tune the first stage of this model instead of training a new one")
    add("--keep-first-stage", action="store_true", help="use the first stage of --first-stage without fine-tuning")
    add(
        "--perceptual",
        action=argparse.BooleanOptionalAction,
        help="train the first stage with LPIPS and a discriminator: sharper and slower, downloads VGG16 (default: on a "
        "GPU)",
    )
    add("--max-steps", type=positive_int, metavar="N", help="steps of each training run (default: by the images)")
    add("--quick", action="store_true", help="tiny networks and 100 steps, to try the commands in minutes")
    add(
        "--gpu-memory",
        type=_gigabytes,
        metavar="GB",
        help="size the networks for a GPU with this memory, 0 for none (default: as on this machine)",
    )


def _fraction(text: str) -> float:
    """Parse a share from 0 to below 1."""
    value = finite_float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return value


def _gigabytes(text: str) -> float:
    """Parse an amount of memory."""
    value = finite_float(text)
    if not 0 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of gigabytes")
    return value


def _options(args: argparse.Namespace) -> Options:
    """Return the options of the preparation.

    Raises:
        UserError: options contradict each other.
    """
    from ldm.data.superresolution import find_degradation
    from ldm.preparation.preparation import Options

    for name, task in (("captions", "text"), ("vocab", "text"), ("labels", "class")):
        if getattr(args, name) is not None and args.task != task:
            raise UserError(f"--{name} belongs to --task {task}; leave it out for --task {args.task}")
    if args.keep_first_stage and args.first_stage is None:
        raise UserError("--keep-first-stage needs --first-stage, the model whose first stage is used")
    find_degradation(args.degradation, 1, 1)
    folder = Path(args.folder).expanduser()
    name = folder.resolve().name or "images"
    return Options(
        folder=folder,
        outdir=Path(args.outdir).expanduser() if args.outdir else Path(PREPARED) / f"{name}-{args.task}",
        task=args.task,
        size=args.size,
        table=Path(args.table).expanduser() if args.table else None,
        captions=args.captions,
        labels=args.labels,
        fraction=args.val_fraction,
        first_stage=args.first_stage,
        keeps_first_stage=args.keep_first_stage,
        vocabulary=args.vocab,
        with_losses=args.perceptual,
        degradation=args.degradation,
        steps=args.max_steps,
        quick=args.quick,
    )


def _machine(gpu_memory: float | None) -> Machine:
    import dataclasses

    from ldm.preparation.machine import GIGABYTE, Machine

    machine = Machine.this()
    return machine if gpu_memory is None else dataclasses.replace(machine, gpu_memory=int(gpu_memory * GIGABYTE))


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = make_parser().parse_args(argv)
    options = _options(args)

    from ldm.preparation.preparation import check_paths, inspect, prepare

    check_paths(options, args.force or args.inspect)
    if args.inspect:
        inspect(options, say)
        return
    machine = _machine(args.gpu_memory)
    preparation = prepare(options, machine, say)
    _report(preparation, options, machine)
    commands = training_commands(preparation, options.outdir)
    commands.append(sampling_command(preparation, options))
    say("\nTrain and sample with these commands:\n")
    for words in commands:
        say(f"  {words}")


def _report(preparation: Preparation, options: Options, machine: Machine) -> None:
    """Print what was written, and how it was sized."""
    recipe = preparation.recipe
    data, plan, stage = recipe.data, recipe.stage_plan, recipe.stage
    say(f"machine: {machine}")
    side = data.size // stage.factor
    shape = f"{data.size} px to latents of {side} × {side} × {stage.channels}"
    if plan is None:
        say(f"first stage: that of {stage.name}, {shape}")
    else:
        start = f"fine-tuned from {stage.name}, " if stage.name else ""
        say(f"first stage: {start}{shape}, {plan.parameters / 1e6:.0f} million weights, {plan.steps:,} steps")
    plan = recipe.plan
    say(f"model: {plan.parameters / 1e6:.0f} million weights, {plan.steps:,} steps of {plan.items} images")
    names = ", ".join(path.name for path in preparation.files)
    validation = "" if data.validation is None else f" and {_rows(data.validation):,} for validation"
    say(f"images for training: {data.count:,}{validation}")
    say(f"wrote {options.outdir}: {names}")


def _rows(table: Path) -> int:
    from ldm.data.tables import read_table

    return len(read_table(table))


def training_commands(preparation: Preparation, out: Path) -> list[str]:
    """Return the commands that train the first stage, unless it is used as it is, and the diffusion model."""
    from ldm.preparation.results import FIRST_STAGE, LDM, RUNS

    names = [LDM] if preparation.recipe.stage_plan is None else [FIRST_STAGE, LDM]
    return [_command("train", "--base", out / name, "-t", "--logdir", out / RUNS) for name in names]


def sampling_command(preparation: Preparation, options: Options) -> str:
    """Return the command that samples from the newest trained model, after writing the inputs that it needs."""
    from ldm.preparation.results import LDM, RUNS

    out, task = options.outdir, options.task
    model = ("--model", out / RUNS / f"*_{Path(LDM).stem}")
    results = ("--outdir", out / SAMPLES)
    if task == "text":
        return _command("txt2img", *model, *_option("--prompt", preparation.captions[0]), "--scale", "3", *results)
    if task == "class":
        names = [
            str(label) if name.startswith("-") else name  # a label cannot be taken for an option
            for label, name in enumerate(preparation.classes[:MOST_CLASSES])
        ]
        return _command("class2img", *model, *results, "--classes", *names)
    if task == "unconditional":
        return _command("sample_diffusion", *model, "-n", "16", "-l", out / SAMPLES)
    from ldm.preparation.examples import write_examples

    write_examples(preparation.recipe.data, out / EXAMPLES)
    return _command("inpaint" if task == "inpainting" else "superres", *model, "--indir", out / EXAMPLES, *results)


def _option(name: str, value: str) -> list[str]:
    """Return the words of an option, whose value may begin with a dash."""
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def _command(name: str, *words: str | Path) -> str:
    return f"{program_of(name)} {shlex.join(map(str, words))}"
