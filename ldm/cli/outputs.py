"""Destinations of sampled images: files with metadata, and a grid of them all."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import say
from ldm.io.files import check_writable

if TYPE_CHECKING:
    import numpy as np

    from ldm.cli.metadata import RunInfo
    from ldm.cli.task import Inputs, Task
    from ldm.pipelines.generation import Sample
    from ldm.pipelines.pipeline import Pipeline

GRID_LIMIT = 256  # images that a grid shows at most
GRID_SIDE = 1024  # longest side of an image in a grid, in pixels


class Output(ABC):
    """Destination of the images of one run."""

    def plan(self, inputs: Sequence[Inputs], seed: int, batch_size: int) -> Sequence[int]:
        """Return the indices of the images to sample.

        Args:
            inputs: of all images of the run.
            seed: of the first image.
            batch_size: images sampled at once.
        """
        self.inputs, self.seed = inputs, seed
        return range(len(inputs))

    def open(self, run: RunInfo, pipeline: Pipeline) -> None:
        """Prepare the destination, once, after the model is loaded."""
        self.run, self.pipeline = run, pipeline

    @abstractmethod
    def save(self, sample: Sample) -> None:
        """Write one image."""

    @abstractmethod
    def close(self, seconds: float, finished: bool) -> None:
        """Write what belongs to the whole run, and print where the images are.

        Args:
            seconds: the time that sampling took.
            finished: False if an error or the user stopped the run.
        """


class ImageFolder(Output):
    """Folder of numbered or named PNG files, and a grid."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        self.outdir = Path(args.outdir)
        check_writable(self.outdir, "--outdir")

    def open(self, run: RunInfo, pipeline: Pipeline) -> None:
        """See `Output.open`."""
        from ldm.io.images import next_index

        super().open(run, pipeline)
        self.first = next_index(self.task.path(self.outdir, self.inputs[0], 0).parent)
        self.paths: list[Path] = []
        self.rows: list[list[np.ndarray]] = []

    def save(self, sample: Sample) -> None:
        """Write one image with its metadata."""
        from ldm.io.grids import shrink
        from ldm.io.images import save_png

        inputs = self.inputs[sample.item.index]
        path = self.task.path(self.outdir, inputs, self.first + sample.item.index)
        save_png(sample.pixels, path, self.run.text(inputs, sample.item.seed, sample.position))
        self.paths.append(path)
        if len(self.rows) < GRID_LIMIT:
            panels = [*self.task.panels(sample, self.pipeline), sample.pixels]
            self.rows.append([shrink(panel, GRID_SIDE) for panel in panels])

    def close(self, seconds: float, finished: bool) -> None:
        """Write the grid, and print where the images are."""
        from ldm.io.grids import make_sheet
        from ldm.io.images import save_png

        if not self.paths:
            return
        path = self.task.grid_path(self.outdir, self.args, self.inputs)
        try:
            if path is not None:
                grid = make_sheet(self.rows, self.task.grid_columns(self.args))
                save_png(grid, path, self.run.sheet_text(self.inputs))
        finally:
            self._print_paths(seconds)
        if path is not None:
            say(f"grid: {path}")

    def _print_paths(self, seconds: float) -> None:
        count, last = len(self.paths), self.paths[-1].name
        where: Any = self.paths[0] if count == 1 else f"{self.paths[0]} to {last}"
        say(f"{count} {'image' if count == 1 else 'images'} in {seconds:.1f} s: {where}")
