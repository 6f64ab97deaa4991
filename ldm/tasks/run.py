"""What every command that draws does: choose, check, load, draw in batches, save with the settings inside."""

from __future__ import annotations

import argparse
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import command, say
from ldm.config.model_config import read_config
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.io.files import check_writable
from ldm.tasks.metadata import Origin, Place
from ldm.tasks.task import Inputs, Settings, Task

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

logger = logging.getLogger("ldm")

SEED_RANGE = 2**63  # of torch's generators
SHEET_LIMIT = 256  # pictures that a sheet shows at most
SHEET_SIDE = 1024  # pixels of a side that a picture has in a sheet at most


def command_of(task: Task) -> Callable[[Sequence[str] | None], int]:
    """The `main` of the command that runs `task`; it returns the exit status."""

    @command
    def main(argv: Sequence[str] | None = None) -> None:
        run(task, task.make_parser().parse_args(argv))

    return main


@dataclass
class Picture:
    """One picture to draw: its place in the run, its seed, what it is drawn from, and that in memory."""

    index: int
    seed: int
    inputs: Inputs
    loaded: Any = None


def run(task: Task, args: argparse.Namespace) -> None:
    """Draw all that the options ask for.

    Raises:
        UserError: nothing can be drawn, or, after the rest was drawn, some pictures could not.
    """
    files = task.choose_model(args)
    config = read_config(files.config)
    settings = task.settings(args, files, config)
    outdir = Path(args.outdir)
    check_writable(outdir, "--outdir")
    inputs = task.inputs(args, files)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    pictures = [Picture(i, (seed + i) % SEED_RANGE, each) for i, each in enumerate(inputs)]
    model, origin = open_model(args, files, task, settings, config)
    task.begin(model, settings, inputs)
    failures: list[UserError] = []
    size = args.batch_size or task.default_batch(args)
    started = time.monotonic()
    saver = Saver(task, args, outdir, origin, inputs)
    try:
        draw_all(task, model, batches(task, pictures, settings, size, failures), settings, len(inputs), saver.save)
    except BaseException:
        with suppress(UserError):  # what stopped the drawing is what is told
            saver.finish(time.monotonic() - started)
        raise
    saver.finish(time.monotonic() - started)
    if failures:
        raise UserError(f"{len(failures)} of {len(inputs)} could not be drawn; see above")


def open_model(
    args: argparse.Namespace, files: ModelFiles, task: Task, settings: Settings, config: Mapping[str, Any]
) -> tuple[Any, Origin]:
    """The model, on its device and in its precision, and what pictures say of where they come from."""
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.loading import choose_device, load_model

    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    model = load_model(config, files.checkpoint, device, precision)
    return model, Origin.of(task.name, files, str(precision).removeprefix("torch."), settings)


def batches(
    task: Task, pictures: Sequence[Picture], settings: Settings, size: int, failures: list[UserError]
) -> Iterator[list[Picture]]:
    """Neighbouring pictures that can be drawn together, `size` at most; what cannot be read goes to `failures`."""
    batch: list[Picture] = []
    for picture in pictures:
        try:
            picture.loaded = task.load(picture.inputs, settings)
        except UserError as error:
            logger.error("%s", error)
            failures.append(error)
            continue
        if batch and (len(batch) == size or task.kind(batch[0].loaded) != task.kind(picture.loaded)):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def draw_all(
    task: Task,
    model: Any,
    groups: Iterator[list[Picture]],
    settings: Settings,
    count: int,
    save: Callable[[Picture, np.ndarray, Place], None],
) -> None:
    """Draw batch after batch, saving each picture as soon as its batch is done."""
    from tqdm import tqdm

    from ldm.pipelines.sampling import prepared

    with ExitStack() as preparation, tqdm(desc="drawing", unit="step") as progress:
        done = steps = 0
        prepared_for = None
        for batch in groups:
            # Weights are packed as suits the first batch, and that decides the last bits of those after it.
            alike = len(batch), task.kind(batch[0].loaded)
            if alike != prepared_for:
                preparation.close()
                preparation.enter_context(prepared(model))
                prepared_for = alike
            steps += task.steps(settings, batch[0].loaded)
            done += len(batch)
            progress.total = round(steps * count / done)  # as if the rest were like these
            progress.refresh()
            images = draw_batch(task, model, batch, settings, progress)
            for position, (picture, image) in enumerate(zip(batch, images, strict=True)):
                save(picture, image, Place(picture.index, position, len(batch)))
                picture.loaded = None


def draw_batch(
    task: Task, model: Any, batch: Sequence[Picture], settings: Settings, progress: tqdm
) -> Sequence[np.ndarray]:
    """The pictures of one batch, each with the noise of its own seed."""
    import torch

    from ldm.models.diffusion.noise import SeededNoise

    noise = SeededNoise([picture.seed for picture in batch], model.device)
    with torch.no_grad():
        return task.draw(model, [picture.loaded for picture in batch], settings, noise, progress)


class Saver:
    """Writes pictures with their metadata, and the sheet of them all."""

    def __init__(
        self, task: Task, args: argparse.Namespace, outdir: Path, origin: Origin, inputs: Sequence[Inputs]
    ) -> None:
        from ldm.io.images import next_index

        self.task, self.args, self.origin, self.inputs = task, args, origin, inputs
        self.outdir = outdir
        self.first = next_index(task.path(outdir, inputs[0], 0).parent)
        self.paths: list[Path] = []
        self.rows: list[list[np.ndarray]] = []

    def save(self, picture: Picture, image: np.ndarray, place: Place) -> None:
        """Write one picture."""
        from ldm.io.grids import shrink
        from ldm.io.images import save_png

        path = self.task.path(self.outdir, picture.inputs, self.first + picture.index)
        save_png(image, path, self.origin.text(picture.inputs, picture.seed, place))
        self.paths.append(path)
        if len(self.rows) < SHEET_LIMIT:
            self.rows.append([shrink(panel, SHEET_SIDE) for panel in (*self.task.panels(picture.loaded), image)])

    def finish(self, seconds: float) -> None:
        """Write the sheet, and say where the pictures are."""
        from ldm.io.grids import make_sheet
        from ldm.io.images import save_png

        if not self.paths:
            return
        path = self.task.sheet_path(self.outdir, self.args, self.inputs)
        try:
            if path is not None:
                sheet = make_sheet(self.rows, self.task.sheet_columns(self.args))
                save_png(sheet, path, self.origin.sheet_text(self.inputs))
        finally:
            where = str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} to {self.paths[-1].name}"
            say(f"{len(self.paths)} pictures in {seconds:.1f} s: {where}")
        if path is not None:
            say(f"grid: {path}")
