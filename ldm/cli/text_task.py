"""Base class of the tasks with prompts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.command import Parser
from ldm.cli.input_files import check_text, read_prompts
from ldm.cli.options import add_count, add_prompts, non_negative_int, sampler_settings
from ldm.cli.task import Inputs, P, Task
from ldm.config.model_info import ModelInfo
from ldm.config.values import SEED_RANGE
from ldm.errors import UserError
from ldm.io.files import variants

BATCH_FROM_FILE = 16


class TextTask(Task[P]):
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
        parser.add_argument(
            "--n_rows",
            type=non_negative_int,
            default=0,
            metavar="N",
            help="images in a row of the grid (default: %(default)s, as many as --n_samples)",
        )
        parser.add_argument("--fixed_code", action="store_true", help="use the same start noise in every round")
        parser.add_argument("--skip_save", action="store_true", help="write the grid only")
        add_count(parser, "--C", None, "channels of the latents")
        add_count(parser, "--f", None, "pixels of a latent, a side")

    def prompt_settings(self, args: argparse.Namespace, info: ModelInfo, of_model: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the sampler and the negative prompt.

        Args:
            args: the options.
            info: facts about the model.
            of_model: the model's own defaults.

        Raises:
            UserError: The model is not conditioned on text, a text is not valid, or the options contradict the model.
        """
        info.check_reads_text()
        for option, value in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
            check_text(option, value or "")
        if args.skip_save and args.skip_grid:
            raise UserError("--skip_save and --skip_grid together write nothing; leave one out")
        for option, given, own in (("--C", args.C, info.params.get("channels")), ("--f", args.f, info.size.factor)):
            if given not in (None, own):
                raise UserError(f'{option} {given} is not that of the model "{info.name}", {own}; leave it out')
        return {"negative_prompt": args.negative_prompt, **sampler_settings(args, of_model)}

    def with_start_seeds(self, args: argparse.Namespace, inputs: Sequence[Inputs]) -> list[Inputs]:
        """Return the inputs with the seed of the start noise, where `--fixed_code` makes it that of the first round."""
        if not args.fixed_code:
            return list(inputs)
        start_seeds = [(args.seed + index) % SEED_RANGE for index in range(args.n_samples)]
        return [{**each, "start_seed": start_seeds[index % args.n_samples]} for index, each in enumerate(inputs)]

    def read_prompts(self, args: argparse.Namespace, info: ModelInfo) -> list[str]:
        """Return the prompts."""
        if args.from_file is not None:
            return read_prompts(args.from_file)
        return [args.prompt if args.prompt is not None else self.prompts.get(info.name, self.prompts[self.bundled])]

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number of images in a round; at least 16 for prompts from a file."""
        return args.n_samples if args.from_file is None else max(args.n_samples, BATCH_FROM_FILE)

    def before_sampling(self, model: Any, pipeline: Any, inputs: Sequence[Inputs]) -> None:
        """Log what the model does not read of the prompts: unknown words, and ends that are cut."""
        from ldm.pipelines.text import warn_prompts

        warn_prompts(model, [each["prompt"] for each in inputs], pipeline.negative_prompt)

    def grid_paths(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Iterator[Path] | None:
        """Return paths named after the prompt, or numbered ones for prompts from a file."""
        if args.skip_grid or args.from_file is not None:
            return super().grid_paths(outdir, args, inputs)
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "", inputs[0]["prompt"].strip()).replace(" ", "-").lstrip(".")
        name = name.encode()[:150].decode(errors="ignore") or "grid"
        return variants(outdir / f"{name}.png")

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return the number that the options ask for, or the number of images in a round."""
        return args.n_rows or args.n_samples
