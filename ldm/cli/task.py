"""Base class of the commands that sample: options, the model, the inputs of each image, and the files they become.

`ldm.cli.run` runs a task. Inputs are plain JSON values that describe one image; they are written into its PNG file.
Together with the settings of the pipeline, they suffice to sample the image again. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ldm.cli.command import Parser, example
from ldm.cli.options import model_options, run_options
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


class Task(ABC):
    """Command that samples images. The first line of its docstring is the description in its help.

    Attributes:
        name: of the command, and in the metadata of its images.
        arguments: of an example that works as typed.
        outdir: folder for images by default.
        published: the model to use if its weights were downloaded.
        bundled: the model to use otherwise.
        progress: label of the progress bar.
        packed: whether weights are packed; None packs them if the run is long enough to gain from it.
        pipeline_path: dotted path of the pipeline.
    """

    name: ClassVar[str]
    arguments: ClassVar[str]
    outdir: ClassVar[str]
    published: ClassVar[str | None] = None
    bundled: ClassVar[str | None] = None
    progress: ClassVar[str] = "sampling"
    packed: ClassVar[bool | None] = None
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
        return [model_options(), run_options(self.outdir)]

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
    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> Pipeline:
        """Return the pipeline with the settings that the options select.

        Raises:
            UserError: The options are wrong for this model.
        """

    def replayed(self, settings: Mapping[str, Any]) -> Pipeline:
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
    def read(self, inputs: Inputs, pipeline: Pipeline) -> Any:
        """Return the request that `inputs` describe, with the files that they name.

        Raises:
            UserError: A file cannot be used; the other images are sampled.
        """

    def before_sampling(self, model: Any, pipeline: Pipeline, inputs: Sequence[Inputs]) -> None:  # noqa: B027
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

    def panels(self, sample: Sample, pipeline: Pipeline) -> list[np.ndarray]:
        """Return the images (uint8) that a grid shows to the left of a sample."""
        return []

    def grid_path(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Path | None:
        """Return the path of the grid of all images; None for no grid."""
        from ldm.io.images import next_index

        return None if args.skip_grid else outdir / f"grid-{next_index(outdir, 'grid-'):04}.png"

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return the number of images in a row of the grid."""
        return 4
