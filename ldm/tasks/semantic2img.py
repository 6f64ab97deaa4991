"""Label map to image."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import image_side, positive_int
from ldm.config.assets import locate
from ldm.config.model_config import ImageSize
from ldm.config.model_files import ModelFiles, downloaded_model
from ldm.errors import UserError
from ldm.tasks.input_files import file_input, named_files, unchanged
from ldm.tasks.label_maps import read_label_map, read_palette, resize_nearest
from ldm.tasks.task import Inputs, Settings, Task

if TYPE_CHECKING:
    import numpy as np
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise

KEY = "segmentation"  # of maps in a batch, and in the configuration of a model that reads them
MAPS = (".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class LabelMap:
    """What a picture is drawn from."""

    padded: np.ndarray  # (H, W) int64, as large as the model needs
    drawing: np.ndarray  # the map in colours, (height, width, 3) uint8, as large as the picture


class SemanticToImage(Task):
    """Draw pictures from maps of labels, of any size."""

    name = "semantic2img"
    example = "python scripts/semantic2img.py --map data/semantic_examples/lake.png --seed 1"
    outdir = "outputs/semantic2img-samples"
    published = "semantic_synthesis512"
    smaller = "semantic_synthesis256"

    def add_options(self, parser: Parser) -> None:
        """Maps, their colours and size, and how to sample."""
        parser.add_argument(
            "--map",
            nargs="+",
            required=True,
            metavar="FILE",
            help="PNG files, or folders of them: grey or palette pictures of labels, or with --palette in colour",
        )
        parser.add_argument(
            "--palette",
            metavar="FILE",
            help='which colour is which label: lines such as "#87ceeb 156 sky", or JSON {"#87ceeb": 156}',
        )
        parser.add_argument(
            "--n_samples", type=positive_int, default=1, metavar="N", help="pictures a map (default: %(default)s)"
        )
        self.sampler_options(parser, steps=50)
        parser.add_argument("--H", type=image_side, metavar="PIXELS", help="height (default: the map's own)")
        parser.add_argument("--W", type=image_side, metavar="PIXELS", help="width (default: the map's own)")

    def choose_model(self, args: argparse.Namespace) -> ModelFiles:
        """Of the two published models the larger one, where both were downloaded."""
        named = args.model or args.config or args.ckpt
        if not named and downloaded_model(self.smaller) and not downloaded_model(self.published):
            args.model = self.smaller
        return super().choose_model(args)

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler, colours, size, and the number of the model's labels."""
        params = config["params"]
        encoder = (params.get("cond_stage_config") or {}).get("params") or {}
        if params.get("cond_stage_key") != KEY or not isinstance(encoder.get("in_channels"), int):
            drawn_from = params.get("cond_stage_key", "image")
            raise UserError(f'the model "{files.name}" draws from "{drawn_from}", not from maps of labels')
        return {
            **self.sampler_settings(args, config),
            "labels": encoder["in_channels"],
            "palette": read_palette(locate(args.palette)) if args.palette else None,
            "height": args.H,
            "width": args.W,
            "multiple": ImageSize.of(config).multiple,
        }

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each map as often as asked."""
        maps = [file_input("map", path) for path in named_files("--map", args.map, MAPS)]
        return [each for each in maps for _ in range(args.n_samples)]

    def load(self, inputs: Inputs, settings: Settings) -> LabelMap:
        """Read the map, in the size asked for."""
        from ldm.io.pixels import chosen_size, pad_to_multiple

        path = unchanged("map", inputs)
        labels = read_label_map(path, settings["palette"])
        if not 0 <= labels.min() <= labels.max() < settings["labels"]:
            wrong, known = labels.max() if labels.min() >= 0 else labels.min(), settings["labels"]
            raise UserError(f'the map "{path}" has the label {wrong}; this model has {known}, from 0 to {known - 1}')
        labels = resize_nearest(labels, *chosen_size(labels.shape, settings["height"], settings["width"]))
        drawing = colours_of_labels(settings["labels"], settings["palette"])[labels]
        return LabelMap(pad_to_multiple(labels, settings["multiple"]), drawing)

    def kind(self, loaded: LabelMap) -> tuple[int, ...]:
        """The size."""
        return loaded.drawing.shape

    def draw(
        self, model: Any, batch: Sequence[LabelMap], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """One picture for each map; the network runs over all of a large one, as published."""
        import numpy as np
        import torch

        from ldm.io.pixels import to_uint8
        from ldm.pipelines.sampling import SamplerSettings, decode, sample_latents

        labels = torch.from_numpy(np.stack([each.padded for each in batch]))
        one_hot = torch.zeros(len(batch), settings["labels"], *labels.shape[1:]).scatter_(1, labels[:, None], 1.0)
        maps = model.raw_conditioning({KEY: one_hot.movedim(1, -1)})
        told = model.get_learned_conditioning(maps.to(model.dtype))
        latent = (side // model.downsampling for side in labels.shape[1:])
        shape = (len(batch), model.channels, *latent)
        latents = sample_latents(model, shape, SamplerSettings.of(settings), told, None, noise, progress)
        height, width, _ = batch[0].drawing.shape
        return to_uint8(decode(model, latents)[:, :, :height, :width])

    def panels(self, loaded: LabelMap) -> list[np.ndarray]:
        """The map in colours."""
        return [loaded.drawing]


def colours_of_labels(count: int, palette: Mapping[str, int] | None) -> np.ndarray:
    """A colour for each label, (count, 3) uint8: the palette's, and random ones, the same each time, otherwise."""
    import torch

    from ldm.io.pixels import in_random_colours, to_uint8

    colours = to_uint8(in_random_colours(torch.eye(count)[None, :, :, None]))[0, :, 0]
    for colour, label in (palette or {}).items():
        if label < count:
            colours[label] = list(bytes.fromhex(colour[1:]))
    return colours
