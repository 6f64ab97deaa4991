"""In-painting: filling a part of a picture (arXiv:2112.10752, section 4.5)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import non_negative_int, positive_int
from ldm.config.model_config import ImageSize, check_condition
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.tasks.input_files import PICTURES, check_apart, file_input, images_in, result_names, unchanged
from ldm.tasks.restoration import Restoration
from ldm.tasks.task import Inputs, Settings

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise

logger = logging.getLogger(__name__)

SUFFIX = "_mask"  # of a mask's name, after that of its picture


@dataclass(frozen=True)
class MaskedImage:
    """A picture with a part to fill: (H, W, 3) uint8, and (H, W) bool, true where it is filled."""

    image: np.ndarray
    mask: np.ndarray


class Inpainting(Restoration):
    """Fill the masked parts of pictures; the rest comes back unchanged, bit for bit."""

    name = "inpaint"
    example = "python scripts/inpaint.py --indir data/inpainting_examples/drawings --seed 1"
    outdir = "outputs/inpainting_results"
    published, bundled = "inpainting_big", "emoji64-inpaint"

    def add_options(self, parser: Parser) -> None:
        """Those of the published script keep their names and defaults."""
        parser.add_argument(
            "--indir",
            metavar="DIR",
            help=f"fill every picture x.png there where its mask x{SUFFIX}.png is white (any format); "
            "a picture without a mask where it is transparent",
        )
        parser.add_argument("--image", metavar="FILE", help="fill this picture only")
        parser.add_argument(
            "--mask", metavar="FILE", help=f"of --image (default: x{SUFFIX}.png beside it, else its transparency)"
        )
        parser.add_argument(
            "--n_samples", type=positive_int, default=1, metavar="N", help="results a picture (default: %(default)s)"
        )
        parser.add_argument(
            "--feather",
            type=non_negative_int,
            default=0,
            metavar="PIXELS",
            help="fade from what the picture holds to the filling over so many pixels inside the mask's edge "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--tile",
            type=non_negative_int,
            default=0,
            metavar="PIXELS",
            help="draw larger pictures in overlapping tiles of this side, for little memory (default: whole)",
        )
        self.sampler_options(parser, steps=50)

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler, feather and tiles."""
        check_condition(files.name, config, "masked_image", "an in-painting")
        self.check_tile(ImageSize.of(config), args.tile)
        return {**self.sampler_settings(args, config), "feather": args.feather, "tile": args.tile}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each picture and its mask, as often as asked."""
        pairs = find_pairs(args)
        check_apart(args.outdir, [path for pair in pairs for path in pair if path is not None])
        names = result_names([image or mask for image, mask in pairs])
        return [
            {
                **file_input("image", image),
                **file_input("mask", mask),
                "name": name if args.n_samples == 1 else f"{name}-{sample}",
            }
            for name, (image, mask) in zip(names, pairs, strict=True)
            for sample in range(args.n_samples)
        ]

    def default_batch(self, args: argparse.Namespace) -> int:
        """The results of a picture."""
        return args.n_samples

    def load(self, inputs: Inputs, settings: Settings) -> MaskedImage:
        """Read the picture and its mask."""
        if inputs["image"] is None:
            raise UserError(f'the mask "{inputs["mask"]}" has no picture beside it; put it there or remove the mask')
        mask = None if inputs["mask"] is None else unchanged("mask", inputs)
        return read_masked_image(unchanged("image", inputs), mask)

    def kind(self, loaded: MaskedImage) -> Any:
        """Pictures of one size go together."""
        return loaded.mask.shape

    def draw(
        self, model: Any, batch: Sequence[MaskedImage], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """Each picture with its masked part filled."""
        import torch

        from ldm.io.pixels import pad_to_multiple, to_batch, to_uint8
        from ldm.pipelines.sampling import decode

        multiple = model.downsampling * model.model.diffusion_model.downsampling
        image = to_batch([pad_to_multiple(each.image, multiple) for each in batch]).to(model.device, model.dtype)
        masks = [torch.from_numpy(pad_to_multiple(each.mask, multiple)) for each in batch]
        mask = torch.stack(masks)[:, None].to(image) * 2.0 - 1.0
        holed = torch.where(mask > 0, -1.0, image)  # black, as in training
        conditioning = model.get_learned_conditioning({"masked_image": holed, "mask": mask})
        latents = self.sample(model, conditioning, settings, noise, progress)
        filled = to_uint8(decode(model, latents, settings["tile"] // model.downsampling or None))
        return [blend(each, filling, settings["feather"]) for each, filling in zip(batch, filled, strict=True)]

    def panels(self, loaded: MaskedImage) -> list[np.ndarray]:
        """The picture with white where it was filled."""
        import numpy as np

        return [np.where(loaded.mask[..., None], np.uint8(255), loaded.image)]


def find_pairs(args: argparse.Namespace) -> list[tuple[Path | None, Path | None]]:
    """Pictures and their masks; None for what is not there.

    Raises:
        UserError: the options contradict each other, or the folder holds nothing.
    """
    if (args.indir is None) == (args.image is None):
        raise UserError("give either --indir, a folder of pictures and masks, or --image, one picture")
    if args.image is None:
        if args.mask is not None:
            raise UserError("--mask belongs to --image; leave it out with --indir")
        return pair_up(images_in(Path(args.indir)))
    image = Path(args.image)
    if args.mask is not None:
        return [(image, Path(args.mask))]
    beside = sorted(image.parent.iterdir()) if image.is_file() else []
    return [(image, mask_of(image, [path for path in beside if path.suffix.lower() in PICTURES]))]


def mask_of(image: Path, masks: Sequence[Path]) -> Path | None:
    """The mask among `masks` that is named after `image`, of the same format where there are several."""
    own = [mask for mask in masks if mask.stem == image.stem + SUFFIX]
    same_format = [mask for mask in own if mask.suffix == image.suffix]
    return next(iter([*same_format, *own]), None)


def pair_up(pictures: Sequence[Path]) -> list[tuple[Path | None, Path | None]]:
    """Each of `pictures` with its mask, which may be of another format; a mask that nothing needs stands alone."""
    masks = [path for path in pictures if path.stem.endswith(SUFFIX)]
    pairs = [(path, mask_of(path, masks)) for path in pictures if path not in masks]
    used = {mask.stem for _, mask in pairs if mask is not None}
    return [*pairs, *((None, mask) for mask in masks if mask.stem not in used)]


def read_masked_image(image: Path, mask: Path | None) -> MaskedImage:
    """A picture and what to fill of it: where `mask` is white, half or more, or else where the picture is transparent.

    Raises:
        UserError: one of them cannot be read, they differ in size, or there is nothing to fill.
    """
    import numpy as np

    from ldm.io.images import open_image

    if mask is None:
        rgba = np.asarray(open_image(image, keep_alpha=True))
        if rgba.shape[-1] != 4:
            stem = Path(image).stem
            raise UserError(f'"{image}" has no mask: put {stem}{SUFFIX}.png beside it, white where it is to be filled')
        holed, where = MaskedImage(rgba[..., :3], rgba[..., 3] < 128), f'"{image}" is transparent nowhere'
    else:
        picture = np.asarray(open_image(image))
        holed, where = MaskedImage(picture, read_mask(mask)), f'the mask "{mask}" is black everywhere'
        (height, width), (h, w) = picture.shape[:2], holed.mask.shape
        if (height, width) != (h, w):
            raise UserError(
                f'the mask "{mask}" has {w} × {h} pixels, its picture "{image}" {width} × {height}; make them equal'
            )
    if not holed.mask.any():
        raise UserError(f"{where}: there is nothing to fill")
    if holed.mask.all():
        logger.warning('all of "%s" is to be filled: the model sees nothing of it', image)
    return holed


def read_mask(path: str) -> np.ndarray:
    """Where a mask is white, half or more: (H, W) bool. Its transparent parts are black."""
    import numpy as np
    from PIL import Image

    from ldm.io.images import open_image

    picture = open_image(path, keep_alpha=True)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return np.asarray(picture.convert("L")) >= 128


def blend(holed: MaskedImage, filling: np.ndarray, feather: int) -> np.ndarray:
    """The picture with `filling` (at least H × W) where its mask is; what is not masked keeps its values."""
    import numpy as np

    height, width = holed.mask.shape
    weight = edge_weights(holed.mask, feather)[..., None]
    mixed = (1.0 - weight) * holed.image + weight * filling[:height, :width]
    return np.where(holed.mask[..., None], mixed.round().astype(np.uint8), holed.image)


def edge_weights(mask: np.ndarray, feather: int) -> np.ndarray:
    """Weights (H, W): 0 outside the mask, rising inside it to 1 over `feather` pixels from its edge."""
    import torch
    from torch.nn import functional as F

    outside = 1.0 - torch.from_numpy(mask).float()[None, None]
    weight = 1.0 - outside
    for _ in range(feather):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        weight += 1.0 - outside
    return (weight / (feather + 1))[0, 0].numpy()
