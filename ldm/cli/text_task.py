"""Base class of the tasks with prompts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.command import Parser
from ldm.cli.input_files import check_text, read_lines
from ldm.cli.options import add_count, add_prompts, sampler_settings
from ldm.cli.task import Inputs, Task
from ldm.config.model_info import ModelInfo

BATCH_FROM_FILE = 16


class TextTask(Task):
    """Sample images from text."""

    published, bundled = "text2img-large", "emoji64"
    prompts: Mapping[str, str] = {
        "text2img-large": "a painting of a virus monster playing guitar",
        "emoji64": "rocket on a blue background",
    }

    def add_prompt_options(self, parser: Parser) -> None:
        """Add the prompts, the negative prompt and the numbers of images."""
        add_prompts(parser)
        parser.add_argument(
            "--negative_prompt", metavar="TEXT", default="", help="text to avoid; needs a --scale above 1"
        )
        add_count(parser, "--n_iter", 1, "rounds of images")
        add_count(parser, "--n_samples", 4, "images a round")

    def prompt_settings(self, args: argparse.Namespace, info: ModelInfo) -> dict[str, Any]:
        """Return the settings of the sampler and the negative prompt.

        Raises:
            UserError: The model is not conditioned on text, or a text is not valid.
        """
        info.check_reads_text()
        for option, value in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
            check_text(option, value or "")
        return {"negative_prompt": args.negative_prompt, **sampler_settings(args)}

    def read_prompts(self, args: argparse.Namespace, info: ModelInfo) -> list[str]:
        """Return the prompts."""
        if args.from_file is not None:
            return read_lines(args.from_file)
        return [args.prompt if args.prompt is not None else self.prompts.get(info.name, self.prompts[self.bundled])]

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number of images in a round; at least 16 for prompts from a file."""
        return args.n_samples if args.from_file is None else max(args.n_samples, BATCH_FROM_FILE)

    def before_sampling(self, model: Any, pipeline: Any, inputs: Sequence[Inputs]) -> None:
        """Log the words that the vocabulary of the model lacks."""
        from ldm.pipelines.text import warn_unknown_words

        warn_unknown_words(model, [*(each["prompt"] for each in inputs), pipeline.negative_prompt])

    def grid_path(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Path | None:
        """Return a path named after the prompt, or a numbered one; never an existing file."""
        if args.skip_grid or args.from_file is not None:
            return super().grid_path(outdir, args, inputs)
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "", inputs[0]["prompt"].strip()).replace(" ", "-").lstrip(".")
        name = name.encode()[:150].decode(errors="ignore") or "grid"
        candidates = (outdir / f"{name}{suffix}.png" for suffix in ("", *(f"-{n}" for n in range(1, 100_000))))
        return next(path for path in candidates if not path.exists())

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return the number of images in a round."""
        return args.n_samples
