"""The command `txt2img`: sample images from text."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import add_sampler, add_size
from ldm.cli.run import command_of
from ldm.cli.task import Inputs
from ldm.cli.text_task import TextTask
from ldm.config.model_files import ModelFiles
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipelines.text import TextToImage

logger = logging.getLogger(__name__)

LAION_SUFFIX = "-laion400m"  # of the default folder with --laion400m


class Txt2Img(TextTask["TextToImage"]):
    """Sample images from text."""

    name = "txt2img"
    arguments = '--prompt "rocket on a blue background" --ddim_steps 50 --scale 3 --seed 1'
    outdir = "outputs/txt2img-samples"
    pipeline_path = "ldm.pipelines.text.TextToImage"

    def add_options(self, parser: Parser) -> None:
        """Add the options of the published script, with its names and defaults, and a few more."""
        self.add_prompt_options(parser)
        add_sampler(
            parser,
            200,
            scale=5.0,
            steps_flags=("--ddim_steps", "--steps"),
            eta_flags=("--ddim_eta",),
            by_model={"steps": "50 for Stable Diffusion", "scale": "for Stable Diffusion 7.5 (1) and 9 (2)"},
        )
        add_size(parser, "that of the model")
        parser.add_argument(
            "--laion400m",
            action="store_true",
            help=f"sample from the published model {self.published}, to {self.outdir}{LAION_SUFFIX} by default",
        )

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """See `Task.parse`."""
        args = super().parse(argv)
        if args.laion400m and args.outdir == self.outdir:
            args.outdir += LAION_SUFFIX
        return args

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """See `Task.choose_model`; `--laion400m` names the published model."""
        if not args.laion400m:
            return super().choose_model(args)
        if args.model or args.config or args.ckpt:
            raise UserError(f"--laion400m is the model {self.published}; leave out --model, --config and --ckpt")
        files = self.default_model()
        if files is None:
            raise UserError(f"--laion400m is the model {self.published}; run ldm download_weights {self.published}")
        logger.info("model: %s, from %s", files.name, files.checkpoint)
        return files

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> TextToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.text import TextToImage, published_settings

        settings, size = self.prompt_settings(args, info, published_settings(info)), info.size
        height, width = size.check("--H", args.H or size.height), size.check("--W", args.W or size.width)
        return TextToImage(**settings, height=height, width=width)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each prompt, as often as the options ask for."""
        prompts = self.read_prompts(args, info)
        inputs = [{"prompt": prompt} for prompt in prompts for _ in range(args.n_iter * args.n_samples)]
        return self.with_start_seeds(args, inputs)

    def read(self, inputs: Inputs, pipeline: Any) -> str:
        """Return the prompt."""
        return inputs["prompt"]

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Return a path with four digits, as published."""
        return outdir / "samples" / f"{number:04}.png"


main = command_of(Txt2Img())
