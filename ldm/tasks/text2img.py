"""Text to image."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import image_side, positive_int
from ldm.config.model_config import ImageSize, check_text_model
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.tasks.task import Inputs, Settings, Task

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise

logger = logging.getLogger(__name__)

BATCH_FROM_FILE = 16


class TextTask(Task):
    """Draw from text: what all tasks with prompts share."""

    published, bundled = "text2img-large", "emoji64"
    prompts: Mapping[str, str] = {
        "text2img-large": "a painting of a virus monster playing guitar",
        "emoji64": "rocket on a blue background",
    }

    def prompt_options(self, parser: Parser) -> None:
        """Add what to draw, and how often."""
        text = parser.add_mutually_exclusive_group()
        text.add_argument("--prompt", metavar="TEXT", help="what to draw (default: an example that suits the model)")
        text.add_argument("--from-file", metavar="FILE", help="draw each line of a text file; blank lines are skipped")
        parser.add_argument(
            "--negative_prompt", metavar="TEXT", default="", help="what to lead away from; needs --scale above 1"
        )
        parser.add_argument(
            "--n_iter", type=positive_int, default=1, metavar="N", help="rounds of pictures (default: %(default)s)"
        )
        parser.add_argument(
            "--n_samples", type=positive_int, default=4, metavar="N", help="pictures a round (default: %(default)s)"
        )

    def prompt_settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler and negative prompt, checked."""
        check_text_model(files.name, config)
        for option, value in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
            check_text(option, value or "")
        if args.negative_prompt and args.scale == 1:
            raise UserError("--negative_prompt does nothing without guidance; give a --scale above 1")
        return {"negative_prompt": args.negative_prompt, **self.sampler_settings(args, config)}

    def read_prompts(self, args: argparse.Namespace, files: ModelFiles) -> list[str]:
        """The texts to draw."""
        if args.from_file is not None:
            return read_lines(args.from_file)
        return [args.prompt if args.prompt is not None else self.prompts.get(files.name, self.prompts[self.bundled])]

    def default_batch(self, args: argparse.Namespace) -> int:
        """A round, or from a file more."""
        return args.n_samples if args.from_file is None else max(args.n_samples, BATCH_FROM_FILE)

    def begin(self, model: Any, settings: Settings, inputs: Sequence[Inputs]) -> None:
        """Name the words that the model does not know."""
        from ldm.pipelines.sampling import unknown_words

        unknown = unknown_words(model, [*(each["prompt"] for each in inputs), settings["negative_prompt"]])
        if unknown:
            logger.warning("these words are not in the model's vocabulary: %s", ", ".join(unknown))

    def sheet_path(self, outdir: Path, args: argparse.Namespace, inputs: Sequence[Inputs]) -> Path | None:
        """Named after its prompt, or numbered; never over another file."""
        if args.skip_grid or args.from_file is not None:
            return super().sheet_path(outdir, args, inputs)
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "", inputs[0]["prompt"].strip()).replace(" ", "-").lstrip(".")
        name = name.encode()[:150].decode(errors="ignore") or "grid"
        candidates = (outdir / f"{name}{suffix}.png" for suffix in ("", *(f"-{n}" for n in range(1, 100_000))))
        return next(path for path in candidates if not path.exists())

    def sheet_columns(self, args: argparse.Namespace) -> int:
        """A round is a row."""
        return args.n_samples


class TextToImage(TextTask):
    """Draw pictures from text."""

    name = "txt2img"
    example = 'python scripts/txt2img.py --prompt "rocket on a blue background" --ddim_steps 50 --scale 3 --seed 1'
    outdir = "outputs/txt2img-samples"
    steps_flags, eta_flags = ("--ddim_steps",), ("--ddim_eta",)

    def add_options(self, parser: Parser) -> None:
        """Those of the published script keep their names and defaults."""
        self.prompt_options(parser)
        self.sampler_options(parser, steps=200, scale=5.0)
        parser.add_argument("--H", type=image_side, metavar="PIXELS", help="height (default: the model's own)")
        parser.add_argument("--W", type=image_side, metavar="PIXELS", help="width (default: the model's own)")

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler, negative prompt and size."""
        settings = self.prompt_settings(args, files, config)
        size = ImageSize.of(config)
        height, width = size.check("--H", args.H or size.height), size.check("--W", args.W or size.width)
        return {**settings, "height": height, "width": width}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each prompt as often as asked."""
        prompts = self.read_prompts(args, files)
        return [{"prompt": prompt} for prompt in prompts for _ in range(args.n_iter * args.n_samples)]

    def draw(
        self, model: Any, batch: Sequence[Any], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """One picture for each prompt."""
        from ldm.io.pixels import to_uint8
        from ldm.pipelines.sampling import SamplerSettings, text_to_images

        prompts = [each["prompt"] for each in batch]
        latent = settings["height"] // model.downsampling, settings["width"] // model.downsampling
        sampling, negative = SamplerSettings.of(settings), settings["negative_prompt"]
        return to_uint8(text_to_images(model, prompts, latent, sampling, negative, noise, progress))

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Numbered with four digits, as published."""
        return outdir / "samples" / f"{number:04}.png"


def check_text(option: str, text: str) -> None:
    """Whether a text from the command line can be written into a picture.

    Raises:
        UserError: its bytes were no characters.
    """
    if text != text.encode(errors="ignore").decode():
        raise UserError(f"{option} is not valid text; give it in UTF-8")


def read_lines(path: str) -> list[str]:
    """The lines of a file of prompts that are not blank.

    Raises:
        UserError: it is not there, is no text, or has none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f'there is no prompt file "{path}"; check the path') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the prompt file "{path}": {error}; give UTF-8 text') from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f'the prompt file "{path}" is empty; write one prompt a line')
    return prompts
