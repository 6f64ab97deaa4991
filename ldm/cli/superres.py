"""The command `superres`: enlarge images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.input_files import check_apart, file_input, images_in, result_names, unchanged
from ldm.cli.options import add_sampler, non_negative_int, sampler_settings
from ldm.cli.restoration_task import RestorationTask
from ldm.cli.run import command_of
from ldm.cli.task import Inputs
from ldm.config.assets import locate
from ldm.config.model_info import ModelInfo

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.generation import Sample
    from ldm.pipelines.image import ImagePrompt
    from ldm.pipelines.super_resolution import SuperResolution


class Superres(RestorationTask["SuperResolution"]):
    """Enlarge images, and sample the details that they lack; the model determines the factor."""

    name = "superres"
    arguments = "--indir data/superres_examples/drawings --seed 1"
    outdir = "outputs/superres"
    pipeline_path = "ldm.pipelines.super_resolution.SuperResolution"
    published, bundled = "bsr_sr", "emoji64-superres"

    def add_options(self, parser: Parser) -> None:
        """Add the images, the tiles and the sampler."""
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--indir", metavar="DIR", help="enlarge every image there")
        source.add_argument("--image", metavar="FILE", help="enlarge this image only")
        self.add_tile_option(
            parser,
            None,
            "side, in the result, of the overlapping tiles that larger images are sampled in; 0 samples them whole "
            "(default: the size that the model was trained on)",
        )
        add_sampler(
            parser, 100, eta=1.0, by_model={"steps": "50 for Stable Diffusion", "eta": "0 for Stable Diffusion"}
        )
        self.add_text_options(parser, 9.0).add_argument(
            "--noise_level",
            type=non_negative_int,
            metavar="T",
            help="noise that is added to the small image, as a timestep (default: 20)",
        )

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> SuperResolution:
        """See `Task.pipeline`."""
        from ldm.pipelines.super_resolution import (
            default_tile,
            published_settings,
            super_resolution_pipeline,
            upscaling_factor,
        )

        tile = default_tile(info) if args.tile is None else args.tile
        settings = sampler_settings(args, published_settings(info))
        settings |= {"factor": upscaling_factor(info), "tile": tile}
        return super_resolution_pipeline(info, settings, *self.text(args), args.noise_level)

    def replayed(self, settings: Mapping[str, Any]) -> SuperResolution:
        """See `Task.replayed`."""
        from ldm.pipelines.text_super_resolution import TextSuperResolution

        is_text = "noise_level" in settings
        return TextSuperResolution.from_settings(settings) if is_text else super().replayed(settings)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each image."""
        images = images_in(Path(args.indir)) if args.image is None else [locate(args.image)]
        check_apart(args.outdir, images)
        return [
            self.with_prompt(args, {**file_input("image", path), "name": name})
            for path, name in zip(images, result_names(images), strict=True)
        ]

    def read(self, inputs: Inputs, pipeline: Any) -> np.ndarray | ImagePrompt:
        """Return the image, for a model that reads a text with its prompt."""
        import numpy as np

        from ldm.io.images import open_image
        from ldm.pipelines.image import ImagePrompt
        from ldm.pipelines.text_super_resolution import TextSuperResolution

        image = np.asarray(open_image(unchanged("image", inputs)))
        return ImagePrompt(image, inputs.get("prompt", "")) if isinstance(pipeline, TextSuperResolution) else image

    def before_sampling(self, model: Any, pipeline: Any, inputs: Sequence[Inputs]) -> None:
        """See `Task.before_sampling`."""
        self.warn_prompt(model, pipeline, inputs)

    def panels(self, sample: Sample, pipeline: SuperResolution) -> list[np.ndarray]:
        """Return the image, enlarged by bicubic interpolation."""
        request = sample.item.request
        return [bicubic(getattr(request, "image", request), pipeline.factor)]


def bicubic(image: np.ndarray, factor: int) -> np.ndarray:
    """Return an image (H, W, 3) uint8 enlarged by bicubic interpolation."""
    import numpy as np
    from PIL import Image

    small = Image.fromarray(image)
    return np.asarray(small.resize((factor * small.width, factor * small.height), Image.Resampling.BICUBIC))


main = command_of(Superres())
