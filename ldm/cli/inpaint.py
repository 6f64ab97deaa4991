"""The command `inpaint`: fill the masked parts of images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.input_files import check_apart, file_input, images_in, result_names, unchanged
from ldm.cli.options import add_count, add_sampler, non_negative_int, sampler_settings
from ldm.cli.restoration_task import RestorationTask
from ldm.cli.run import command_of
from ldm.cli.task import Inputs
from ldm.config.assets import locate
from ldm.config.model_info import ModelInfo
from ldm.config.values import MASK_MODES
from ldm.errors import UserError
from ldm.io.folders import list_files
from ldm.io.image_formats import image_suffixes

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.generation import Sample
    from ldm.pipelines.inpainting import Inpainting, MaskedImage

logger = logging.getLogger(__name__)

SUFFIX = "_mask"  # of the name of a mask, after that of its image


class Inpaint(RestorationTask["Inpainting"]):
    """Fill the masked parts of images; all other pixels stay as they are, bit for bit."""

    name = "inpaint"
    arguments = "--indir data/inpainting_examples/drawings --seed 1"
    outdir = "outputs/inpainting_results"
    pipeline_path = "ldm.pipelines.inpainting.Inpainting"
    published, bundled = "inpainting_big", "emoji64-inpaint"
    replaces = True  # as published

    def __init__(self) -> None:
        self._factor = 1  # pixels of a latent, a side; of 1 × 1 pixels no mask loses anything
        self._reported: set[str] = set()  # files whose masks were checked

    def add_options(self, parser: Parser) -> None:
        """Add the options of the published script, with its names and defaults, and a few more."""
        parser.add_argument(
            "--indir",
            metavar="DIR",
            help=f"fill every image x.png there where its mask x{SUFFIX}.png is white (any format); "
            "an image without a mask where it is transparent",
        )
        parser.add_argument("--image", metavar="FILE", help="fill this image only")
        parser.add_argument(
            "--mask", metavar="FILE", help=f"mask of --image (default: x{SUFFIX}.png beside it, else its transparency)"
        )
        add_count(parser, "--n_samples", 1, "results an image")
        parser.add_argument(
            "--feather",
            type=non_negative_int,
            default=0,
            metavar="PIXELS",
            help="fade from the image to the filling over so many pixels inside the edge of the mask "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--mask_mode",
            choices=MASK_MODES,
            default="nearest",
            help="reduction of the mask to the size of the latents: nearest, as published, can lose thin strokes; "
            "max keeps them (default: %(default)s)",
        )
        self.add_tile_option(
            parser, 0, "sample larger images in overlapping tiles of this side, with little memory (default: whole)"
        )
        add_sampler(parser, 50)
        self.add_text_options(parser, 7.5)

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> Inpainting:
        """See `Task.pipeline`."""
        from ldm.pipelines.inpainting import inpainting_pipeline

        settings = sampler_settings(args) | {"feather": args.feather, "mask_mode": args.mask_mode, "tile": args.tile}
        return inpainting_pipeline(info, settings, *self.text(args))

    def replayed(self, settings: Mapping[str, Any]) -> Inpainting:
        """See `Task.replayed`."""
        from ldm.pipelines.text_inpainting import TextInpainting

        return TextInpainting.from_settings(settings) if "negative_prompt" in settings else super().replayed(settings)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each image with its mask, as often as the options ask for."""
        pairs = find_pairs(args)
        check_apart(args.outdir, [path for pair in pairs for path in pair if path is not None])
        names = result_names([next(path for path in pair if path is not None) for pair in pairs])
        return [
            self.with_prompt(
                args,
                {
                    **file_input("image", image),
                    **file_input("mask", mask),
                    "name": name if args.n_samples == 1 else f"{name}-{sample}",
                },
            )
            for name, (image, mask) in zip(names, pairs, strict=True)
            for sample in range(args.n_samples)
        ]

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number of results of an image."""
        return args.n_samples

    def read(self, inputs: Inputs, pipeline: Any) -> MaskedImage:
        """Return the image and its mask."""
        if inputs["image"] is None:
            raise UserError(f'the mask "{inputs["mask"]}" has no image beside it; add the image or remove the mask')
        mask = None if inputs["mask"] is None else unchanged("mask", inputs)
        request = replace(read_masked_image(unchanged("image", inputs), mask), prompt=inputs.get("prompt", ""))
        self._warn_if_lost(request, inputs, pipeline)
        return request

    def before_sampling(self, model: Any, pipeline: Any, inputs: Sequence[Inputs]) -> None:
        """Log what the model does not read of the prompt; prepare warnings about thin masks, one for each file."""
        self.warn_prompt(model, pipeline, inputs)
        self._factor = model.downsampling
        self._reported.clear()

    def _warn_if_lost(self, request: MaskedImage, inputs: Inputs, pipeline: Inpainting) -> None:
        from ldm.pipelines.inpainting import loss_warning

        path = inputs["mask"] or inputs["image"]
        if pipeline.mask_mode != "nearest" or path in self._reported:
            return
        self._reported.add(path)
        name = f'the mask "{path}"' if inputs["mask"] else f'the transparent part of "{path}"'
        warning = loss_warning(name, request.mask, self._factor, "--mask_mode max")
        if warning is not None:
            logger.warning("%s", warning)

    def panels(self, sample: Sample, pipeline: Any) -> list[np.ndarray]:
        """Return the image with white in its masked part."""
        import numpy as np

        request = sample.item.request
        return [np.where(request.mask[..., None], np.uint8(255), request.image)]


def find_pairs(args: argparse.Namespace) -> list[tuple[Path | None, Path | None]]:
    """Return images and their masks; None for a missing one.

    Raises:
        UserError: The options contradict each other, or the folder is empty.
    """
    if (args.indir is None) == (args.image is None):
        raise UserError("give either --indir, a folder of images and masks, or --image, one image")
    if args.image is None:
        if args.mask is not None:
            raise UserError("--mask belongs to --image; leave it out with --indir")
        return pair_up(images_in(Path(args.indir)))
    image = locate(args.image)
    if args.mask is not None:
        return [(image, locate(args.mask))]
    beside = list_files(image.parent, image_suffixes()).paths if image.is_file() else []
    return [(image, mask_of(image, beside))]


def mask_of(image: Path, masks: Sequence[Path]) -> Path | None:
    """Return the mask that is named after `image`, of the same format if there are several."""
    own = [mask for mask in masks if mask.stem == image.stem + SUFFIX]
    same_format = [mask for mask in own if mask.suffix == image.suffix]
    return next(iter([*same_format, *own]), None)


def pair_up(images: Sequence[Path]) -> list[tuple[Path | None, Path | None]]:
    """Return each image with its mask, which may have another format, and masks without an image."""
    masks = [path for path in images if path.stem.endswith(SUFFIX)]
    pairs = [(path, mask_of(path, masks)) for path in images if path not in masks]
    used = {mask.stem for _, mask in pairs if mask is not None}
    return [*pairs, *((None, mask) for mask in masks if mask.stem not in used)]


def read_masked_image(image: Path, mask: Path | None) -> MaskedImage:
    """Read an image and its mask; without a mask file the transparent part of the image is the mask.

    Raises:
        UserError: A file cannot be read, the two differ in size, or the mask is empty.
    """
    import numpy as np

    from ldm.io.images import open_image
    from ldm.pipelines.inpainting import MaskedImage
    from ldm.pipelines.inputs import as_mask

    if mask is None:
        rgba = np.asarray(open_image(image, keep_alpha=True))
        if rgba.shape[-1] != 4:
            name = f"{Path(image).stem}{SUFFIX}.png"
            raise UserError(f'"{image}" has no mask: put {name} beside it, white where the image is filled')
        pixels, masked, source = rgba[..., :3], rgba[..., 3] < 128, f'"{image}" is transparent nowhere'
    else:
        pixels, masked = np.asarray(open_image(image)), as_mask(open_image(mask, keep_alpha=True))
        source = f'the mask "{mask}" is black everywhere'
        (height, width), (h, w) = pixels.shape[:2], masked.shape
        if (height, width) != (h, w):
            raise UserError(
                f'the mask "{mask}" has {w} × {h} pixels, its image "{image}" {width} × {height}; make them equal'
            )
    if not masked.any():
        raise UserError(f"{source}: there is nothing to fill")
    if masked.all():
        logger.warning('all of "%s" is masked: the model sees nothing of it', image)
    return MaskedImage(pixels, masked)


main = command_of(Inpaint())
