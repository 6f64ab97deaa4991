"""Runs of thousands of samples: their folder, going on with one that was interrupted, and the array of them all.

What is finished is what lies in the folder `img`: files are written whole or not at all, sample i has the seed s + i
and always the same class, so a run goes on with whatever is missing. The array is made from these files at the end,
one after the other, so that the samples are never in memory together.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser, say
from ldm.config.assets import locate
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.io.files import atomic_path, check_writable
from ldm.tasks.metadata import Origin, Place, Record
from ldm.tasks.run import SEED_RANGE, Picture, batches, draw_all, open_model
from ldm.tasks.sample_diffusion import OWN_FOLDER, SampleDiffusion
from ldm.tasks.task import Inputs, Settings

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

OPTIONS_FILE = "sampling_config.yaml"
SHEET_SAMPLES = 64
SHEET_COLUMNS = 8
# What samples depend on, by the names of the options: one that is the same in every part of a run.
FIXED: Mapping[str, type | tuple[type, ...]] = {
    "custom_steps": int,
    "eta": (int, float),
    "vanilla_sample": bool,
    "sampler": str,
    "scale": (int, float),
    "classes": (list, type(None)),
    "seed": int,
    "precision": str,
    "overrides": list,
}
# What else the file of options must hold.
NEEDED: Mapping[str, type] = {"n_samples": int, "batch_size": int, "resume": str, "config": str, "global_step": int}
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path

    def sample(self, index: int) -> Path:
        """The file of sample `index`."""
        return self.folder / "img" / f"sample_{index:06}.png"

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` samples are not there."""
        folder = self.folder / "img"
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        return [i for i in range(count) if self.sample(i).name not in present]

    def array(self, shape: Sequence[int]) -> Path:
        """The file of all samples, named after their shape (N, H, W, C)."""
        return self.folder / "numpy" / f"{'x'.join(map(str, shape))}-samples.npz"

    def read(self) -> dict[str, Any]:
        """What the run was asked for.

        Raises:
            UserError: the folder is that of no run.
        """
        import yaml

        path = self.folder / OPTIONS_FILE
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged"
            raise UserError(f'--continue: cannot read "{path}": {reason}; name the folder of a run') from None
        for name, kind in {**FIXED, **NEEDED}.items():
            if not isinstance(options, dict) or not isinstance(options.get(name, ...), kind):
                raise UserError(f'--continue: "{path}" has no proper "{name}"; name the folder of a run')
        return options


# -- the options -------------------------------------------------------------------------------------------------


def parse(task: SampleDiffusion, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The options, and what the run to go on with was asked for, whose values hold where the options say nothing.

    Raises:
        UserError: there is no such run, or it was asked for something else.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = task.make_parser()
    args = _parse(parser, words)
    if args.run is None:
        return args, None
    recorded = Run(Path(args.run)).read()
    parser.set_defaults(**{name: recorded[name] for name in (*FIXED, "n_samples", "batch_size") if name != "overrides"})
    args = _parse(parser, words)
    for name in FIXED:
        given, before = getattr(args, name), recorded[name]
        if given != before and (name, given) != ("overrides", []):
            raise UserError(f"--continue: {name} {given} is not the run's {before}; leave it out, or begin a new run")
    if args.n_samples < recorded["n_samples"]:
        raise UserError(f"--continue: the run is of {recorded['n_samples']} samples; give as many or more, or none")
    if args.logdir != OWN_FOLDER:
        raise UserError("--continue names the folder; leave out --logdir")
    return args, recorded


def _parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Values of the configuration may stand anywhere, as in main.py; also after `--classes`, which takes many."""
    args = parser.parse_args([word for word in words if not _OVERRIDE.match(word)])
    args.overrides = [*(word for word in words if _OVERRIDE.match(word)), *args.overrides]
    return args


def _recorded_model(task: SampleDiffusion, args: argparse.Namespace, recorded: Mapping[str, Any]) -> ModelFiles:
    """The model of a run to go on with."""
    config, checkpoint = locate(recorded["config"]), locate(recorded["resume"])
    if args.resume or args.model or args.ckpt:
        given = task.choose_model(args)
        if given.checkpoint.resolve() != checkpoint.resolve():
            raise UserError(
                f'--continue: the run is of the model "{checkpoint}"; leave out the model, or begin a new run'
            )
    for path in (config, checkpoint):
        if not path.is_file():
            raise UserError(f'--continue: the run was of "{path}", which is not there; put it there again')
    return ModelFiles(str(recorded.get("model", checkpoint.parent.name)), config, checkpoint)


# -- the run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a run is going to do; nothing of it is on disk yet."""

    args: argparse.Namespace
    files: ModelFiles
    config: Mapping[str, Any]
    settings: Settings
    inputs: Sequence[Inputs]
    place: Run
    recorded: Mapping[str, Any] | None  # what the run to go on with was asked for
    step: int  # of the training that gave the weights

    @classmethod
    def plan(cls, task: SampleDiffusion, argv: Sequence[str] | None) -> Job:
        """Read and check the options, the configuration and the run to go on with.

        Raises:
            UserError: one of them is wrong.
        """
        args, recorded = parse(task, argv)
        files = task.choose_model(args) if recorded is None else _recorded_model(task, args, recorded)
        if recorded is not None:
            args.overrides = []  # they are in the configuration that the run has kept
        config = task.model_config(args, files)
        settings, inputs = task.settings(args, files, config), task.inputs(args, files)
        base = task.base(args, files) if recorded is None else Path(args.run)
        check_writable(base, "--logdir" if recorded is None else "--continue")
        args.seed = secrets.randbelow(2**32) if args.seed is None else args.seed

        from ldm.io.checkpoint.reading import training_step

        step = training_step(files.checkpoint)
        if recorded is not None and recorded["global_step"] != step:
            was = recorded["global_step"]
            raise UserError(f'--continue: "{files.checkpoint}" is of step {step}, the run of {was}; begin a new run')
        place = Run(base if recorded is not None else _new_folder(base / f"{step:08}"))
        return cls(args, files, config, settings, inputs, place, recorded, step)

    def options(self, origin: Origin) -> dict[str, Any]:
        """What the file of options says."""
        own = {name: getattr(self.args, name) for name in (*FIXED, "n_samples", "batch_size", "logdir")}
        if self.recorded is not None:
            return {**self.recorded, "n_samples": own["n_samples"], "batch_size": own["batch_size"]}
        model = {"resume": origin.checkpoint, "config": origin.config, "model": origin.model, "global_step": self.step}
        return {**model, **own, "eta": self.settings["eta"], "version": origin.version}

    def pictures(self, missing: Collection[int]) -> list[Picture]:
        """All pictures of the batches that lack some: in the batch that it belongs to, each comes out the same."""
        size = self.args.batch_size
        blocks = sorted({i // size for i in missing})
        numbers = [i for block in blocks for i in range(block * size, (block + 1) * size) if i < len(self.inputs)]
        return [Picture(i, (self.args.seed + i) % SEED_RANGE, self.inputs[i]) for i in numbers]


def run(task: SampleDiffusion, argv: Sequence[str] | None = None) -> None:
    """Draw all samples that are missing, then write the array and the sheet.

    Raises:
        UserError: the options, the model or the run to go on with are wrong; nothing was written then.
    """
    job = Job.plan(task, argv)
    missing = job.place.missing(len(job.inputs))
    if missing:
        _draw(task, job, missing)
    _join(job.place, job.inputs, job.args.seed, bool(missing))


def _new_folder(parent: Path) -> Path:
    """A folder named after the time, which is not there yet."""
    name = time.strftime("%Y-%m-%d-%H-%M-%S")
    candidates = (parent / f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(1, 100_000))))
    return next(path for path in candidates if not path.exists())


def _draw(task: SampleDiffusion, job: Job, missing: Sequence[int]) -> None:
    """Draw the samples that are missing."""
    from ldm.io.images import save_png

    args, files, place, wanted, count = job.args, job.files, job.place, set(missing), len(job.inputs)
    if args.overrides:  # the run keeps the configuration with the values that were given
        files = ModelFiles(files.name, place.folder / "config.yaml", files.checkpoint)
    model, origin = open_model(args, files, task, job.settings, job.config)
    if args.overrides:
        _save_yaml(files.config, {"model": job.config})
    _save_yaml(place.folder / OPTIONS_FILE, job.options(origin))

    def save(picture: Picture, image: np.ndarray, where: Place) -> None:
        if picture.index in wanted:
            save_png(image, place.sample(picture.index), origin.text(picture.inputs, picture.seed, where))

    logger.info("drawing %d samples of %d into %s", len(wanted), count, place.folder)
    started, pictures = time.monotonic(), job.pictures(wanted)
    groups = batches(task, pictures, job.settings, args.batch_size, [])
    try:
        draw_all(task, model, groups, job.settings, len(pictures), save)
    except BaseException:
        finished = count - len(place.missing(count))
        say(f"{finished} of {count} samples are finished; go on with --continue {place.folder}")
        raise
    say(f"{len(wanted)} samples in {time.monotonic() - started:.1f} s: {place.folder / 'img'}")


def _save_yaml(path: Path, content: Mapping[str, Any]) -> None:
    from omegaconf import OmegaConf

    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.create(dict(content)), temporary)


# -- the results -------------------------------------------------------------------------------------------------


def _join(place: Run, inputs: Sequence[Inputs], seed: int, changed: bool) -> None:
    """Write the array of all samples, as tools that measure them read it, and the sheet of the first.

    `arr_0` is (N, H, W, C) uint8, `arr_1` (N,) the classes where there are any, `seeds` (N,) the seeds.
    """
    import numpy as np

    from ldm.io.grids import make_sheet
    from ldm.io.images import open_image, save_png
    from ldm.io.npz import Rows, write_npz

    count = len(inputs)
    paths = [place.sample(i) for i in range(count)]
    shape = (count, *_pixels(paths[0]).shape)
    target, sheet = place.array(shape), place.folder / "grid.png"
    if not changed and target.is_file() and sheet.is_file():
        say(f"all {count} samples are there: {target}")
        return
    arrays = {"arr_0": Rows(shape, np.dtype(np.uint8), _read_all(paths, shape[1:]))}
    if "class_label" in inputs[0]:
        arrays["arr_1"] = Rows.of(np.array([each["class_label"] for each in inputs], np.int64))
    arrays["seeds"] = Rows.of(np.array([(seed + i) % SEED_RANGE for i in range(count)], np.int64))
    write_npz(target, arrays)
    say(f"array: {target}")
    first = [[np.asarray(open_image(path))] for path in paths[:SHEET_SAMPLES]]
    origin = Record.read(paths[0]).origin
    save_png(make_sheet(first, SHEET_COLUMNS), sheet, origin.sheet_text(inputs[:SHEET_SAMPLES]))
    say(f"grid: {sheet}")


def _read_all(paths: Sequence[Path], shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The pixels of each sample, one after the other.

    Raises:
        UserError: one is damaged or of another shape.
    """
    from tqdm import tqdm

    for path in tqdm(paths, desc="joining", unit="sample"):
        pixels = _pixels(path)
        if pixels.shape != shape:
            raise UserError(f'the sample "{path}" has the shape {pixels.shape}, not {shape}; delete it and go on')
        yield pixels


def _pixels(path: Path) -> np.ndarray:
    """A sample as (H, W, C) uint8."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as file:
            pixels = np.asarray(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f'cannot read the sample "{path}": {error}; delete it and go on with --continue') from None
    return pixels if pixels.ndim == 3 else pixels[..., None]
