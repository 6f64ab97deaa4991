"""What a command that draws consists of; `ldm.tasks.run` is what all of them share.

A run has one `settings` and a list of pictures, each with `inputs`. Both are plain JSON values, are written into every
PNG, and are all that it takes to draw the picture again. Nothing here imports torch: mistakes are told before.
"""

from __future__ import annotations

import argparse
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ldm.cli.command import Parser
from ldm.cli.options import finite_float, model_options, non_negative_float, positive_int, run_options
from ldm.config.model_config import check_steps
from ldm.config.model_files import ModelFiles, available_models, downloaded_model, find_model, named_model
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise

logger = logging.getLogger(__name__)

Settings = dict[str, Any]
Inputs = dict[str, Any]


class Task(ABC):
    """One kind of drawing, such as text to image. Its docstring's first line heads the command's help."""

    name: ClassVar[str]  # of the command and, among its metadata, of the pictures
    example: ClassVar[str]  # a command line that works as typed
    outdir: ClassVar[str]  # where pictures go unless told
    published: ClassVar[str | None] = None  # the model to take where its weights were downloaded
    bundled: ClassVar[str | None] = None  # the model to take otherwise
    steps_flags: ClassVar[Sequence[str]] = ("--steps",)  # options for the steps and eta, as the published command has
    eta_flags: ClassVar[Sequence[str]] = ("--eta",)

    @property
    def download(self) -> str:
        """How to get the published model."""
        return f"run python scripts/download_weights.py {self.published}"

    # -- the command ---------------------------------------------------------------------------------------------

    def make_parser(self) -> Parser:
        """The options: those of every command, and the task's own."""
        parser = Parser(
            description=(type(self).__doc__ or "").splitlines()[0],
            epilog=f"example: {self.example}",
            parents=[model_options(), run_options(self.outdir)],
        )
        self.add_options(parser)
        return parser

    @abstractmethod
    def add_options(self, parser: Parser) -> None:
        """Add the task's own options."""

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """The model asked for, else the published one where it was downloaded, else the bundled one."""
        files = find_model(args.model, args.config, args.ckpt)
        if files is not None:
            logger.info("model: %s, from %s", files.name, files.checkpoint)
            return files
        files = downloaded_model(self.published) if self.published else None
        if files is not None:
            other = f" (the bundled one: --model {self.bundled})" if self.bundled else ""
            logger.info("model: %s, from %s%s", files.name, files.checkpoint, other)
            return files
        if self.bundled not in available_models():
            raise UserError(f"there is no model to draw with; {self.download}, or name one with --model or --ckpt")
        files = named_model(self.bundled)
        logger.info("model: %s, the bundled one of small drawings; for the published one %s", files.name, self.download)
        return files

    @abstractmethod
    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """What all pictures share.

        Raises:
            UserError: the options are wrong, or the model, described by `config`, cannot do this.
        """

    @abstractmethod
    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """What each picture is drawn from, in order; picture i has the seed `--seed` + i.

        Raises:
            UserError: there is nothing to draw from.
        """

    def default_batch(self, args: argparse.Namespace) -> int:
        """Pictures at once where `--batch_size` does not say."""
        return 1

    # -- the drawing ---------------------------------------------------------------------------------------------

    def begin(self, model: Any, settings: Settings, inputs: Sequence[Inputs]) -> None:  # noqa: B027 (most need none)
        """Called once, with the loaded model, before anything is drawn; for warnings."""

    def load(self, inputs: Inputs, settings: Settings) -> Any:
        """Read what `inputs` name.

        Raises:
            UserError: it cannot be used; the other pictures are drawn nevertheless.
        """
        return inputs

    def kind(self, loaded: Any) -> Any:
        """Pictures can be drawn in one batch when this is equal for them, such as their size."""
        return None

    def steps(self, settings: Settings, loaded: Any) -> int:
        """How often drawing a batch of such pictures advances the progress."""
        return settings["steps"]

    @abstractmethod
    def draw(
        self, model: Any, batch: Sequence[Any], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """The pictures of a batch of loaded inputs, each `(H, W, 3)` uint8."""

    # -- the files -----------------------------------------------------------------------------------------------

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Where a picture goes; `number` goes on from those that are there."""
        return outdir / "samples" / f"{number:05}.png"

    def panels(self, loaded: Any) -> list[np.ndarray]:
        """What the sheet shows to the left of a picture, uint8."""
        return []

    def sheet_path(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Path | None:
        """Where the sheet of all pictures goes; None for no sheet."""
        from ldm.io.images import next_index

        return None if args.skip_grid else outdir / f"grid-{next_index(outdir, 'grid-'):04}.png"

    def sheet_columns(self, args: argparse.Namespace) -> int:
        """Pictures in a row of the sheet."""
        return 4

    # -- how to sample -------------------------------------------------------------------------------------------

    def sampler_options(self, parser: Parser, steps: int, scale: float | None = None, eta: float = 0.0) -> None:
        """Add how to sample; without `scale` nothing is guided. `eta` is for DDIM, the others have none."""
        parser.add_argument(
            *self.steps_flags, dest="steps", type=positive_int, default=steps, metavar="N", help="default: %(default)s"
        )
        choice = parser.add_mutually_exclusive_group()
        for name, text in (
            ("plms", "sample with PLMS instead of DDIM"),
            ("dpm", f"sample with DPM-Solver++, for which 20 {self.steps_flags[-1]} are enough"),
        ):
            choice.add_argument(f"--{name}", dest="sampler", action="store_const", const=name, help=text)
        parser.set_defaults(sampler="ddim", own_eta=eta)
        parser.add_argument(
            *self.eta_flags,
            dest="eta",
            type=non_negative_float,
            default=eta,
            metavar="ETA",
            help="0 is deterministic, 1 is as DDPM (default: %(default)s)" + ("; of DDIM" if eta else ""),
        )
        if scale is not None:
            parser.add_argument(
                "--scale", type=finite_float, default=scale, help="guidance; 1 is none (default: %(default)s)"
            )

    def sampler_settings(self, args: argparse.Namespace, config: Mapping[str, Any]) -> Settings:
        """The fields of `ldm.inference.SamplerSettings` that the options give, checked against the model.

        Raises:
            UserError: they contradict each other, or the model has fewer steps.
        """
        check_steps(config, args.steps)
        eta = args.eta
        if args.sampler != "ddim":
            eta = 0.0 if args.eta == args.own_eta else args.eta
        if args.sampler != "ddim" and eta:
            given = f"{self.eta_flags[-1]} {eta:g}"
            raise UserError(f"--{args.sampler} is deterministic; leave out {given}, or --{args.sampler}")
        return {"sampler": args.sampler, "steps": args.steps, "eta": eta, "scale": getattr(args, "scale", 1.0)}
