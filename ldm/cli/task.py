"""Base class of the commands that sample: options, the model, the inputs of each image, and the files they become.

`ldm.cli.run` runs a task. Inputs are plain JSON values that describe one image; they are written into its PNG file.
Together with the settings of the pipeline, they suffice to sample the image again. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ldm.cli.command import Parser, example
from ldm.cli.options import addition_options, model_options, run_options
from ldm.config.model_files import ModelFiles, available_models, downloaded_model, find_model, named_model
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.cli.outputs import Output
    from ldm.pipelines.generation import Sample
    from ldm.pipelines.pipeline import Pipeline

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]
P = TypeVar("P", bound="Pipeline")


class Task(ABC, Generic[P]):
    """Command that samples images. The first line of its docstring is the description in its help.

    Attributes:
        name: of the command, and in the metadata of its images.
        arguments: of an example that works as typed.
        outdir: folder for images by default.
        published: the model to use if its weights were downloaded.
        bundled: the model to use otherwise.
        progress: label of the progress bar.
        packed: whether weights are packed; None packs them if the run is long enough to gain from it.
        replaces: whether an image replaces an earlier one of the same name.
        pipeline_path: dotted path of the pipeline.
    """

    name: ClassVar[str]
    arguments: ClassVar[str]
    outdir: ClassVar[str]
    published: ClassVar[str | None] = None
    bundled: ClassVar[str | None] = None
    progress: ClassVar[str] = "sampling"
    packed: ClassVar[bool | None] = None
    replaces: ClassVar[bool] = False
    pipeline_path: ClassVar[str]

    # -- options -------------------------------------------------------------------------------------------------

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse the command line."""
        return self.make_parser().parse_args(argv)

    def make_parser(self) -> Parser:
        """Return the parser: the options of every task, and its own."""
        parser = Parser(
            description=(type(self).__doc__ or "").splitlines()[0],
            epilog=example(self.name, self.arguments),
            parents=self.parents(),
        )
        self.add_options(parser)
        return parser

    def parents(self) -> list[argparse.ArgumentParser]:
        """Return the parsers of the shared options."""
        return [model_options(), addition_options(), run_options(self.outdir)]

    @abstractmethod
    def add_options(self, parser: Parser) -> None:
        """Add the options of the task."""

    # -- the model -----------------------------------------------------------------------------------------------

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """Return the model that the options name, else the published one if it was downloaded, else the bundled one.

        Raises:
            UserError: There is none.
        """
        files = find_model(args.model, args.config, args.ckpt)
        if files is not None:
            logger.info("model: %s, from %s", files.name, files.checkpoint)
            return files
        published = self.default_model()
        if published is not None:
            other = f" (the bundled one: --model {self.bundled})" if self.bundled else ""
            logger.info("model: %s, from %s%s", published.name, published.checkpoint, other)
            return published
        download = f"run ldm download_weights {self.published}"
        if self.bundled not in available_models():
            raise UserError(f"there is no model to sample from; {download}, or name one with --model or --ckpt")
        files = named_model(self.bundled)
        logger.info("model: %s, the bundled one of small drawings; for the published one %s", files.name, download)
        return files

    def default_model(self) -> ModelFiles | None:
        """Return the published model of the task if its weights were downloaded."""
        return downloaded_model(self.published) if self.published else None

    def read_info(self, args: argparse.Namespace, files: ModelFiles) -> ModelInfo:
        """Read the configuration of the model."""
        return ModelInfo.read(files)

    def load_model(self, files: ModelFiles, info: ModelInfo, device: torch.device, precision: torch.dtype) -> Any:
        """Load the model."""
        from ldm.pipelines.loading import load_files

        return load_files(files, info.config, device, precision)

    # -- what to sample ------------------------------------------------------------------------------------------

    @abstractmethod
    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> P:
        """Return the pipeline with the settings that the options select.

        Raises:
            UserError: The options are wrong for this model.
        """

    def replayed(self, settings: Mapping[str, Any]) -> P:
        """Return the pipeline with recorded settings."""
        module, _, name = self.pipeline_path.rpartition(".")
        return getattr(import_module(module), name).from_settings(settings)

    @abstractmethod
    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return the inputs of each image, in order; image i uses the seed `--seed` + i.

        Raises:
            UserError: There is nothing to sample.
        """

    @abstractmethod
    def read(self, inputs: Inputs, pipeline: P) -> Any:
        """Return the request that `inputs` describe, with the files that they name.

        Raises:
            UserError: A file cannot be used; the other images are sampled.
        """

    def before_sampling(self, model: Any, pipeline: P, inputs: Sequence[Inputs]) -> None:
        """Log warnings about the inputs, with the loaded model."""

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number of images sampled at once without `--batch_size`."""
        return 1

    # -- files ---------------------------------------------------------------------------------------------------

    def output(self, args: argparse.Namespace, files: ModelFiles, info: ModelInfo) -> Output:
        """Return the destination of the images.

        Raises:
            UserError: It cannot be written to.
        """
        from ldm.cli.outputs import ImageFolder

        return ImageFolder(self, args)

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Return the path of an image; `number` continues from the images that exist."""
        return outdir / "samples" / f"{number:05}.png"

    def new_paths(self, outdir: Path, inputs: Inputs, number: int) -> Iterator[Path]:
        """Yield paths for a new image, in order of preference."""
        return (self.path(outdir, inputs, each) for each in itertools.count(number))

    def panels(self, sample: Sample, pipeline: P) -> list[np.ndarray]:
        """Return the images (uint8) that a grid shows to the left of a sample."""
        return []

    def grid_paths(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Iterator[Path] | None:
        """Return paths for the grid of all images, in order of preference; None for no grid."""
        from ldm.io.images import next_index

        if args.skip_grid:
            return None
        return (outdir / f"grid-{number:04}.png" for number in itertools.count(next_index(outdir, "grid-")))

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return the number of images in a row of the grid."""
        return 4
