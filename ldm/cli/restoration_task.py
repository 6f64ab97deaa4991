"""Base class of the tasks that restore images: one result for each image, named after it.

Some models restore by a text, as those of Stable Diffusion.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.command import Parser
from ldm.cli.input_files import check_text
from ldm.cli.options import finite_float, non_negative_int
from ldm.cli.task import Inputs, P, Task
from ldm.io.files import variants


class RestorationTask(Task[P]):
    """Restore images."""

    def add_tile_option(self, parser: Parser, default: int | None, what: str) -> None:
        """Add the side of the tiles that large images are sampled in."""
        parser.add_argument("--tile", type=non_negative_int, default=default, metavar="PIXELS", help=what)

    def add_text_options(self, parser: Parser, scale: float) -> Any:
        """Add the prompt, the negative prompt and the guidance scale of models that restore by a text.

        Returns:
            The group of these options.
        """
        group = parser.add_argument_group("text", "for models of Stable Diffusion")
        group.add_argument("--prompt", metavar="TEXT", default="", help="text that describes the results")
        group.add_argument("--negative_prompt", metavar="TEXT", default="", help="text to avoid")
        group.add_argument(
            "--scale",
            dest="guidance_scale",
            type=finite_float,
            metavar="S",
            help=f"guidance scale; 1 is none (default: {scale})",
        )
        return group

    def text(self, args: argparse.Namespace) -> tuple[list[str], str, float | None]:
        """Return the prompts, the negative prompt and the guidance scale that the options state.

        Raises:
            UserError: A text is not valid.
        """
        for option, value in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
            check_text(option, value)
        return [args.prompt], args.negative_prompt, args.guidance_scale

    def with_prompt(self, args: argparse.Namespace, inputs: Inputs) -> Inputs:
        """Return the inputs of an image with the prompt if there is one."""
        return {**inputs, "prompt": args.prompt} if args.prompt else inputs

    def warn_prompt(self, model: Any, pipeline: Any, inputs: Sequence[Inputs]) -> None:
        """Log what the model does not read of the prompts."""
        from ldm.pipelines.text import warn_prompts

        prompts = [each["prompt"] for each in inputs if "prompt" in each]
        warn_prompts(model, prompts, getattr(pipeline, "negative_prompt", ""))

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Return a path with the name of the image."""
        return outdir / f"{inputs['name']}.png"

    def new_paths(self, outdir: Path, inputs: Inputs, number: int) -> Iterator[Path]:
        """Yield the name of the image, then `name-1.png` and so on."""
        return variants(self.path(outdir, inputs, number))

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return 2: each image stands beside its result."""
        return 2
