"""Image and text to image."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import image_side
from ldm.config.model_config import ImageSize
from ldm.config.model_files import ModelFiles
from ldm.tasks.input_files import PICTURES, file_input, named_files, unchanged
from ldm.tasks.task import Inputs, Settings
from ldm.tasks.text2img import TextTask

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise


@dataclass(frozen=True)
class Start:
    """What a picture is drawn from."""

    prompt: str
    pixels: np.ndarray  # (H, W, 3) uint8, as it was asked for
    padded: np.ndarray  # the same, as large as the model needs


class ImageToImage(TextTask):
    """Draw pictures from pictures and text: noised, and drawn anew from there (SDEdit, arXiv:2108.01073)."""

    name = "img2img"
    example = (
        "python scripts/img2img.py --image data/img2img_examples/rocket.png "
        '--prompt "rocket on a blue background" --strength 0.2 --scale 3 --seed 1'
    )
    outdir = "outputs/img2img-samples"
    steps_flags, eta_flags = ("--steps", "--ddim_steps"), ("--eta", "--ddim_eta")

    def add_options(self, parser: Parser) -> None:
        """Pictures, how far to leave them, and the options of text to image."""
        parser.add_argument(
            "--image",
            "--init-img",
            nargs="+",
            required=True,
            metavar="FILE",
            help="pictures to start from, or folders of them",
        )
        parser.add_argument(
            "--strength",
            type=share,
            default=0.75,
            metavar="S",
            help="how far to leave the picture: the share of the steps that are walked, above 0 and at most 1, "
            "which leaves next to nothing of it (default: %(default)s)",
        )
        self.prompt_options(parser)
        self.sampler_options(parser, steps=50, scale=5.0)
        parser.add_argument("--H", type=image_side, metavar="PIXELS", help="height (default: the picture's own)")
        parser.add_argument("--W", type=image_side, metavar="PIXELS", help="width (default: the picture's own)")

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler, negative prompt, strength and size."""
        settings = self.prompt_settings(args, files, config)
        multiple = ImageSize.of(config).multiple
        return {**settings, "strength": args.strength, "height": args.H, "width": args.W, "multiple": multiple}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each picture with each prompt, as often as asked."""
        pictures = [file_input("image", path) for path in named_files("--image", args.image, PICTURES)]
        prompts, times = self.read_prompts(args, files), range(args.n_iter * args.n_samples)
        return [{"prompt": prompt, **picture} for picture in pictures for prompt in prompts for _ in times]

    def load(self, inputs: Inputs, settings: Settings) -> Start:
        """Read the picture, in the size asked for: where the shape differs, its middle."""
        import numpy as np
        from PIL import Image, ImageOps

        from ldm.io.images import open_image
        from ldm.io.pixels import chosen_size, pad_to_multiple

        picture = open_image(unchanged("image", inputs))
        own = (picture.height, picture.width)
        height, width = chosen_size(own, settings["height"], settings["width"])
        if (height, width) != own:
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
        return Start(inputs["prompt"], pixels, pad_to_multiple(pixels, settings["multiple"]))

    def kind(self, loaded: Start) -> tuple[int, ...]:
        """The size."""
        return loaded.pixels.shape

    def steps(self, settings: Settings, loaded: Start) -> int:
        """Those that the strength leaves, if the grid is even."""
        return math.ceil(round(settings["steps"] * settings["strength"], 6))

    def draw(
        self, model: Any, batch: Sequence[Start], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """One picture for each."""
        from ldm.io.pixels import to_batch, to_uint8
        from ldm.pipelines.sampling import SamplerSettings, decode, encode, sample_latents, text_conditioning

        sampling = SamplerSettings.of(settings)
        latents = encode(model, to_batch([each.padded for each in batch]))
        told, away = text_conditioning(model, [each.prompt for each in batch], sampling, settings["negative_prompt"])
        latents = sample_latents(
            model, latents.shape, sampling, told, away, noise, progress, x0=latents, strength=settings["strength"]
        )
        height, width, _ = batch[0].pixels.shape
        return to_uint8(decode(model, latents)[:, :, :height, :width])

    def panels(self, loaded: Start) -> list[np.ndarray]:
        """The picture that was started from."""
        return [loaded.pixels]


def share(text: str) -> float:
    """An argument type: a number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number') from None
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
