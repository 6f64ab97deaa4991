"""Layout to image."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.options import positive_int
from ldm.config.assets import locate
from ldm.config.model_config import ImageSize
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.tasks.input_files import named_files
from ldm.tasks.layout_files import read_labels, read_layouts, resolve
from ldm.tasks.task import Inputs, Settings, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from tqdm import tqdm

    from ldm.models.diffusion.noise import SeededNoise

logger = logging.getLogger(__name__)

KEY = "coordinates_bbox"  # of layouts in a batch, and in the configuration of a model that reads them


@dataclass(frozen=True)
class Layout:
    """What a picture is drawn from."""

    tokens: Tensor  # (L,) int64
    drawing: np.ndarray  # of the boxes, (H, W, 3) uint8


class LayoutToImage(Task):
    """Draw pictures from layouts of labelled boxes."""

    name = "layout2img"
    example = (
        "python scripts/layout2img.py --layout data/layout_examples --labels class-descriptions-boxable.csv --seed 1"
    )
    outdir = "outputs/layout2img-samples"
    published = "layout2img-openimages256"

    def add_options(self, parser: Parser) -> None:
        """Layouts, names of labels, and how to sample."""
        parser.add_argument(
            "--layout",
            nargs="+",
            required=True,
            metavar="FILE",
            help='JSON files, or folders of them: {"boxes": [{"label": "Dog", "box": [left, top, right, bottom]}]}, or '
            'lists of such; positions in [0, 1], or in pixels with "size": [width, height]',
        )
        parser.add_argument(
            "--labels",
            metavar="FILE",
            help="names of the model's classes in their order, one a line, or a CSV with names in the last column "
            "(default: class_names of the model's configuration; without, labels are numbers)",
        )
        parser.add_argument(
            "--n_samples", type=positive_int, default=1, metavar="N", help="pictures a layout (default: %(default)s)"
        )
        self.sampler_options(parser, steps=200, scale=1.0)

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler, size, and the vocabulary and length of the model's sequences."""
        params = config["params"]
        reader = (params.get("cond_stage_config") or {}).get("params") or {}
        if params.get("cond_stage_key") != KEY or not isinstance(reader.get("vocab_size"), int):
            drawn_from = params.get("cond_stage_key", "image")
            raise UserError(f'the model "{files.name}" draws from "{drawn_from}", not from layouts; choose another')
        if args.scale != 1 and not params.get("cond_dropout"):
            logger.warning("this model was not trained for guidance: it has seen few layouts without boxes")
        self.names = read_labels(locate(args.labels)) if args.labels else list(params.get("class_names") or ())
        size = ImageSize.of(config)
        tokens = {"vocabulary": reader["vocab_size"], "tokens": reader.get("max_seq_len", 77)}
        return {**self.sampler_settings(args, config), **tokens, "height": size.height, "width": size.width}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each layout as often as asked; what is wrong with one is told when its turn comes."""
        found: list[Inputs] = []
        for path in named_files("--layout", args.layout, (".json",)):
            try:
                layouts = read_layouts(path)
            except UserError as error:
                found.append({"layout": str(path), "mistake": str(error)})
                continue
            for number, layout in enumerate(layouts, 1):
                where = str(path) if len(layouts) == 1 else f"{path} #{number}"
                try:
                    found += args.n_samples * [{"layout": where, **resolve(layout, self.names)}]
                except UserError as error:
                    found.append({"layout": where, "mistake": f'"{where}": {error}'})
        if all("mistake" in each for each in found):
            raise UserError(found[0]["mistake"])  # before a model is loaded for nothing
        return found

    def load(self, inputs: Inputs, settings: Settings) -> Layout:
        """The tokens, and a drawing of the boxes."""
        if "mistake" in inputs:
            raise UserError(inputs["mistake"])

        from ldm.io.grids import draw_boxes
        from ldm.io.pixels import to_uint8
        from ldm.modules.encoders.layout import Box, LayoutTokens

        boxes = inputs["boxes"]
        try:
            tokens = LayoutTokens(settings["vocabulary"]).encode(
                [Box(each["label"], tuple(each["box"])) for each in boxes], settings["tokens"]
            )
        except UserError as error:
            raise UserError(f'"{inputs["layout"]}": {error}') from None
        size = settings["width"], settings["height"]
        labels = [each["name"] for each in boxes]
        drawing = draw_boxes(size, [each["box"] for each in boxes], labels, max(size[1] // 25, 8))
        return Layout(tokens, to_uint8(drawing))

    def draw(
        self, model: Any, batch: Sequence[Layout], settings: Settings, noise: SeededNoise, progress: tqdm
    ) -> Sequence[np.ndarray]:
        """One picture for each layout."""
        import torch

        from ldm.io.pixels import to_uint8
        from ldm.modules.encoders.layout import LayoutTokens
        from ldm.pipelines.sampling import SamplerSettings, decode, sample_latents

        sampling = SamplerSettings.of(settings)
        tokens = torch.stack([each.tokens for each in batch]).to(model.device)
        told, away = model.get_learned_conditioning(tokens), None
        if sampling.scale != 1:
            away = model.get_learned_conditioning(torch.full_like(tokens, LayoutTokens(settings["vocabulary"]).none))
        latent = settings["height"] // model.downsampling, settings["width"] // model.downsampling
        shape = (len(batch), model.channels, *latent)
        return to_uint8(decode(model, sample_latents(model, shape, sampling, told, away, noise, progress)))

    def panels(self, loaded: Layout) -> list[np.ndarray]:
        """The boxes."""
        return [loaded.drawing]
