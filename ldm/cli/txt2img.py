"""The command `txt2img`: sample images from text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import add_sampler, add_size
from ldm.cli.run import command_of
from ldm.cli.task import Inputs
from ldm.cli.text_task import TextTask
from ldm.config.model_info import ModelInfo

if TYPE_CHECKING:
    from ldm.pipelines.text import TextToImage


class Txt2Img(TextTask):
    """Sample images from text."""

    name = "txt2img"
    arguments = '--prompt "rocket on a blue background" --ddim_steps 50 --scale 3 --seed 1'
    outdir = "outputs/txt2img-samples"
    pipeline_path = "ldm.pipelines.text.TextToImage"

    def add_options(self, parser: Parser) -> None:
        """Add the options of the published script, with its names and defaults, and a few more."""
        self.add_prompt_options(parser)
        add_sampler(parser, 200, scale=5.0, steps_flags=("--ddim_steps",), eta_flags=("--ddim_eta",))
        add_size(parser, "that of the model")

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> TextToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.text import TextToImage

        settings, size = self.prompt_settings(args, info), info.size
        height, width = size.check("--H", args.H or size.height), size.check("--W", args.W or size.width)
        return TextToImage(**settings, height=height, width=width)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each prompt, as often as the options ask for."""
        prompts = self.read_prompts(args, info)
        return [{"prompt": prompt} for prompt in prompts for _ in range(args.n_iter * args.n_samples)]

    def read(self, inputs: Inputs, pipeline: Any) -> str:
        """Return the prompt."""
        return inputs["prompt"]

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Return a path with four digits, as published."""
        return outdir / "samples" / f"{number:04}.png"


main = command_of(Txt2Img())
