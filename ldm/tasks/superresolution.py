"""Super-resolution: a picture with several times as many pixels each way (arXiv:2112.10752, section 4.4)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import non_negative_int
from ldm.config.model_config import ImageSize, check_condition
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.tasks.input_files import check_apart, file_input, images_in, result_names, unchanged
from ldm.tasks.restoration import Restoration
from ldm.tasks.task import Inputs, Settings

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise

DECODED_AT_ONCE = 128  # side in latents; larger maps are decoded in tiles of it


@dataclass(frozen=True)
class Small:
    """A picture to enlarge: (H, W, 3) uint8, and how many times."""

    image: np.ndarray
    factor: int


class SuperResolution(Restoration):
    """Enlarge pictures, drawing the details that they lack; the model decides how many times."""

    name = "superres"
    example = "python scripts/superres.py --indir data/superres_examples/drawings --seed 1"
    outdir = "outputs/superres"
    published, bundled = "bsr_sr", "emoji64-superres"

    def add_options(self, parser: Parser) -> None:
        """What to enlarge, tiles and sampling."""
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--indir", metavar="DIR", help="enlarge every picture there")
        source.add_argument("--image", metavar="FILE", help="enlarge this picture only")
        parser.add_argument(
            "--tile",
            type=non_negative_int,
            metavar="PIXELS",
            help="side, in the result, of the overlapping tiles that larger pictures are drawn in; 0 draws them whole "
            "(default: the size that the model was trained on)",
        )
        self.sampler_options(parser, steps=100, eta=1.0)

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler and tiles."""
        check_condition(files.name, config, "LR_image", "a super-resolution")
        size = ImageSize.of(config)
        tile = max(size.height, size.width) if args.tile is None else self.check_tile(size, args.tile)
        return {**self.sampler_settings(args, config), "factor": enlargement(files.name, config), "tile": tile}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each picture."""
        pictures = images_in(Path(args.indir)) if args.image is None else [Path(args.image)]
        check_apart(args.outdir, pictures)
        return [
            {**file_input("image", path), "name": name}
            for path, name in zip(pictures, result_names(pictures), strict=True)
        ]

    def load(self, inputs: Inputs, settings: Settings) -> Small:
        """Read the picture."""
        import numpy as np

        from ldm.io.images import open_image

        return Small(np.asarray(open_image(unchanged("image", inputs))), settings["factor"])

    def kind(self, loaded: Small) -> Any:
        """Pictures of one size go together."""
        return loaded.image.shape

    def draw(
        self, model: Any, batch: Sequence[Small], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """Each picture, enlarged."""
        from ldm.io.pixels import pad_to_multiple, to_batch, to_uint8
        from ldm.pipelines.sampling import decode

        factor = settings["factor"]
        multiple = model.downsampling * model.model.diffusion_model.downsampling // factor
        small = to_batch([pad_to_multiple(each.image, multiple) for each in batch]).to(model.device, model.dtype)
        conditioning = model.get_learned_conditioning(small)
        latents = self.sample(model, conditioning, settings, noise, progress)
        height, width = (factor * side for side in batch[0].image.shape[:2])
        return to_uint8(decode(model, latents, DECODED_AT_ONCE)[:, :, :height, :width])

    def panels(self, loaded: Small) -> list[np.ndarray]:
        """The picture enlarged without a model, by bicubic interpolation."""
        import numpy as np
        from PIL import Image

        picture = Image.fromarray(loaded.image)
        size = tuple(loaded.factor * side for side in picture.size)
        return [np.asarray(picture.resize(size, Image.Resampling.BICUBIC))]


def enlargement(name: str, config: Mapping[str, Any]) -> int:
    """How many times a model enlarges: pixels of a latent over those of the small picture at its place.

    Raises:
        UserError: what the model does with small pictures is not known here.
    """
    stage = config["params"].get("cond_stage_config")
    target = stage.get("target") if isinstance(stage, Mapping) else stage
    if target not in ("torch.nn.Identity", "torch.nn.PixelUnshuffle"):
        raise UserError(
            f'the model "{name}" reads small pictures by "{target}", which does not tell how many times it enlarges; '
            "its cond_stage_config must be torch.nn.Identity or torch.nn.PixelUnshuffle"
        )
    pixels = 1 if target == "torch.nn.Identity" else int(stage["params"]["downscale_factor"])
    return ImageSize.of(config).factor // pixels
