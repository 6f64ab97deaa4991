"""Run a task: options, settings, one call of the library, files, in that order."""

from __future__ import annotations

import argparse
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from ldm.cli.command import command
from ldm.cli.task import Inputs, Task
from ldm.config.values import SEED_RANGE
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipelines.generation import Item
    from ldm.pipelines.pipeline import Pipeline

logger = logging.getLogger("ldm")


def command_of(task: Task) -> Callable[[Sequence[str] | None], int]:
    """Return the `main` of the command that runs `task`; it returns the exit status."""

    @command
    def main(argv: Sequence[str] | None = None) -> None:
        run(task, task.parse(argv))

    return main


def run(task: Task, args: argparse.Namespace) -> None:
    """Sample everything that the options ask for.

    Raises:
        UserError: Nothing can be sampled; or some images could not, after the others were.
    """
    files = task.choose_model(args)
    info = task.read_info(args, files)
    pipeline = task.pipeline(args, info)
    pipeline.check(info)
    output = task.output(args, files, info)
    inputs = task.inputs(args, info)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
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
    reader = Reader(task, pipeline, inputs, missing, seed)
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
                output.save(sample)
    except BaseException:
        with suppress(UserError):  # the first error is reported
            output.close(time.monotonic() - started, False)
        raise
    output.close(time.monotonic() - started, not reader.failures)
    if reader.failures:
        raise UserError(f"{len(reader.failures)} of {len(inputs)} failed; see above")


class Reader:
    """Iterable of the items of a run, each read when its turn comes; errors are logged and collected in `failures`."""

    def __init__(
        self, task: Task, pipeline: Pipeline, inputs: Sequence[Inputs], indices: Sequence[int], seed: int
    ) -> None:
        self.task, self.pipeline, self.inputs, self.indices, self.seed = task, pipeline, inputs, indices, seed
        self.failures: list[UserError] = []

    def __iter__(self) -> Iterator[Item]:
        from ldm.pipelines.generation import Item

        for index in self.indices:
            try:
                request = self.task.read(self.inputs[index], self.pipeline)
            except UserError as error:
                if str(error) not in map(str, self.failures):  # several images of one file have the same error
                    logger.error("%s", error)
                self.failures.append(error)
                continue
            yield Item(index, (self.seed + index) % SEED_RANGE, request)
