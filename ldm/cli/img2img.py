"""The command `img2img`: sample images from an image and a prompt."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.command import Parser
from ldm.cli.input_files import file_input, named_files, unchanged
from ldm.cli.options import add_sampler, add_size, share
from ldm.cli.run import command_of
from ldm.cli.task import Inputs
from ldm.cli.text_task import TextTask
from ldm.config.model_info import ModelInfo
from ldm.io.image_formats import image_suffixes

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.generation import Sample
    from ldm.pipelines.image import ImagePrompt, ImageToImage


class Img2Img(TextTask["ImageToImage"]):
    """Sample images from an image and a prompt: add noise to the image, and denoise it (SDEdit, arXiv:2108.01073)."""

    name = "img2img"
    arguments = (
        "--image data/img2img_examples/rocket.png "
        '--prompt "rocket on a blue background" --strength 0.2 --scale 3 --seed 1'
    )
    outdir = "outputs/img2img-samples"
    pipeline_path = "ldm.pipelines.image.ImageToImage"

    def add_options(self, parser: Parser) -> None:
        """Add the images, the strength, and the options of text to image."""
        parser.add_argument(
            "--image",
            "--init-img",
            nargs="+",
            required=True,
            metavar="FILE",
            help="images to start from, or folders of them",
        )
        parser.add_argument(
            "--strength",
            type=share,
            default=0.75,
            metavar="S",
            help="share of the steps that are sampled, above 0 and at most 1, which leaves almost nothing of the image "
            "(default: %(default)s)",
        )
        self.add_prompt_options(parser)
        add_sampler(
            parser,
            50,
            scale=5.0,
            steps_flags=("--steps", "--ddim_steps"),
            eta_flags=("--eta", "--ddim_eta"),
            by_model={"scale": "9 for Stable Diffusion 2"},
        )
        add_size(parser, "that of the image")

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> ImageToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.image import ImageToImage, published_settings, start_settings

        settings = self.prompt_settings(args, info, published_settings(info))
        settings |= start_settings(info, settings)
        return ImageToImage(**settings, strength=args.strength, height=args.H, width=args.W)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each image with each prompt, as often as the options ask for."""
        images = [file_input("image", path) for path in named_files("--image", args.image, image_suffixes(), "images")]
        prompts, times = self.read_prompts(args, info), range(args.n_iter * args.n_samples)
        inputs = [{"prompt": prompt, **image} for image in images for prompt in prompts for _ in times]
        return self.with_start_seeds(args, inputs)

    def read(self, inputs: Inputs, pipeline: ImageToImage) -> ImagePrompt:
        """Return the image, in the size of the settings, with its prompt."""
        import numpy as np

        from ldm.io.images import open_image
        from ldm.pipelines.image import ImagePrompt

        image = np.asarray(open_image(unchanged("image", inputs)))
        return ImagePrompt(pipeline.fit(image), inputs["prompt"])

    def panels(self, sample: Sample, pipeline: ImageToImage) -> list[np.ndarray]:
        """Return the image that sampling started from."""
        return [sample.item.request.image]


main = command_of(Img2Img())
