"""Destinations of sampled images: files with metadata, and a grid of them all."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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


SPANS = 8  # groups of files that a line names at most


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
    """Folder of numbered or named PNG files, and a grid. Several runs may write to one folder at the same time."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        self.outdir = Path(args.outdir)
        self.writes_images = not getattr(args, "skip_save", False)
        check_writable(self.outdir, "--outdir")

    def open(self, run: RunInfo, pipeline: Pipeline) -> None:
        """See `Output.open`."""
        from ldm.io.grids import ContactSheet
        from ldm.io.images import next_index

        super().open(run, pipeline)
        self.first = next_index(self.task.path(self.outdir, self.inputs[0], 0).parent)
        self.paths: list[Path] = []
        self.count = 0
        self.sheet = ContactSheet(len(self.inputs), self.task.grid_columns(self.args))

    def save(self, sample: Sample) -> None:
        """Write one image with its metadata, and add it to the grid."""
        inputs = self.inputs[sample.item.index]
        if self.writes_images:
            text = self.run.text(inputs, sample.item.seed, sample.position)
            self.paths.append(self._write(sample.image, inputs, self.first + sample.item.index, text))
        self.count += 1
        self.sheet.add([*self.task.panels(sample, self.pipeline), sample.image])

    def _write(self, pixels: np.ndarray, inputs: Inputs, number: int, text: Mapping[str, Any]) -> Path:
        """Write one image and return its path."""
        from ldm.io.images import save_new_png, save_png

        if self.task.replaces:
            path = self.task.path(self.outdir, inputs, number)
            save_png(pixels, path, text)
            return path
        return save_new_png(pixels, self.task.new_paths(self.outdir, inputs, number), text)

    def close(self, seconds: float, finished: bool) -> None:
        """Write the grid, and print where the images are."""
        from ldm.io.images import save_new_png

        if not self.count:
            return
        grid_paths = self.task.grid_paths(self.outdir, self.args, self.inputs)
        try:
            if grid_paths is not None:
                path = save_new_png(self.sheet.image(), grid_paths, self.run.sheet_text(self.inputs))
        finally:
            self._print_paths(seconds)
        if grid_paths is not None:
            say(f"grid: {path}")

    def _print_paths(self, seconds: float) -> None:
        taken = f"{self.count} {'image' if self.count == 1 else 'images'} in {seconds:.1f} s"
        if not self.paths:
            say(taken)
            return
        first, *others = spans([path.name for path in self.paths])
        listed = [str(self.paths[0].with_name(first)), *others[: SPANS - 1], *(["…"] if len(others) >= SPANS else [])]
        say(f"{taken}: {', '.join(listed)}")


def spans(names: Sequence[str]) -> list[str]:
    """Return names of files in short: "first to last" of consecutive numbers, and of names without numbers."""
    groups: list[list[str]] = []
    for name in names:
        before = groups[-1][-1].partition(".")[0] if groups else ""
        number = name.partition(".")[0]
        apart = before.isdecimal() and number.isdecimal() and int(number) != int(before) + 1
        if groups and not apart:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
