"""Run a task: options, settings, one call of the library, files, in that order."""

from __future__ import annotations

import argparse
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Main, command
from ldm.cli.task import Inputs, Task
from ldm.config.model_files import with_additions
from ldm.config.values import SEED_RANGE
from ldm.errors import DiskFullError, UserError

if TYPE_CHECKING:
    from ldm.cli.outputs import Output
    from ldm.pipelines.generation import Item, Sample
    from ldm.pipelines.pipeline import Pipeline

logger = logging.getLogger("ldm")
ADDITIONS: dict[str, Any] = {
    "vae": None,
    "lora": (),
    "embedding": (),
}  # options that add weights to a model, and their defaults


def command_of(task: Task) -> Main:
    """Return the `main` of the command that runs `task`."""

    @command
    def main(argv: Sequence[str] | None = None) -> None:
        run(task, task.parse(argv))

    return main


def run(task: Task, args: argparse.Namespace) -> None:
    """Sample everything that the options ask for.

    Raises:
        UserError: Nothing can be sampled; or some images could not be sampled or saved, after the others were.
        DiskFullError: The disk is full; the images until then are saved.
    """
    # Not every task has these options.
    vae, loras, embeddings = (getattr(args, name, default) for name, default in ADDITIONS.items())
    files = with_additions(task.choose_model(args), vae, loras, embeddings)
    info = task.read_info(args, files)
    pipeline = task.pipeline(args, info)
    pipeline.check(info)
    output = task.output(args, files, info)
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    seed, inputs = args.seed, task.inputs(args, info)
    batch_size = args.batch_size or task.default_batch_size(args)
    missing = output.plan(inputs, seed, batch_size)

    from ldm.cli.metadata import RunInfo
    from ldm.modules.precision import choose_precision
    from ldm.pipelines.generation import generate
    from ldm.pipelines.loading import choose_device

    if not missing:  # a finished run that is continued
        output.close(0.0, True)
        return
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    model = task.load_model(files, info, device, precision)
    run_info = RunInfo.of(task.name, files, str(precision).removeprefix("torch."), pipeline.settings())
    output.open(run_info, pipeline)
    task.before_sampling(model, pipeline, inputs)
    failures = Failures()
    reader = Reader(task, pipeline, inputs, missing, seed, failures)
    started = time.monotonic()
    samples = generate(
        pipeline,
        model,
        reader,
        count=len(missing),
        batch_size=batch_size,
        packed=task.packed,
        description=task.progress,
    )
    try:
        with closing(samples):
            for sample in samples:
                _save(output, sample, failures)
    except BaseException:
        with suppress(UserError):  # the first error is reported
            output.close(time.monotonic() - started, False)
        raise
    output.close(time.monotonic() - started, not failures.count)
    if failures.count:
        raise UserError(f"{failures.count} of {len(inputs)} failed; see above")


def _save(output: Output, sample: Sample, failures: Failures) -> None:
    """Save one image, or add to `failures` why it could not be computed or saved.

    Raises:
        DiskFullError: No further image could be saved.
    """
    if sample.error is not None:
        inputs = output.inputs[sample.item.index]
        file = inputs.get("image") or inputs.get("map")
        failures.add(UserError(f'"{file}": {sample.error}') if file else sample.error)
        return
    try:
        output.save(sample)
    except DiskFullError:
        raise
    except UserError as error:
        failures.add(error)


class Failures:
    """Images of a run that failed: their number, and a log line for each different error."""

    def __init__(self) -> None:
        self.count = 0
        self._messages: set[str] = set()

    def add(self, error: UserError) -> None:
        """Count an image, and log its error unless another image had the same, such as one of the same file."""
        self.count += 1
        if str(error) not in self._messages:
            self._messages.add(str(error))
            logger.error("%s", error)


class Reader:
    """Iterable of the items of a run, each read when its turn comes; errors are added to `failures`."""

    def __init__(
        self,
        task: Task,
        pipeline: Pipeline,
        inputs: Sequence[Inputs],
        indices: Sequence[int],
        seed: int,
        failures: Failures,
    ) -> None:
        self.task, self.pipeline, self.inputs, self.indices, self.seed = task, pipeline, inputs, indices, seed
        self.failures = failures

    def __iter__(self) -> Iterator[Item]:
        from ldm.pipelines.generation import Item

        for index in self.indices:
            try:
                request = self.task.read(self.inputs[index], self.pipeline)
            except UserError as error:
                self.failures.add(error)
                continue
            yield Item(index, (self.seed + index) % SEED_RANGE, request, self.inputs[index].get("start_seed"))
