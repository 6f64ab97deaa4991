"""The command `semantic2img`: sample images from label maps."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.command import Parser
from ldm.cli.input_files import file_input, named_files, unchanged
from ldm.cli.options import add_count, add_sampler, add_size, sampler_settings
from ldm.cli.run import command_of
from ldm.cli.task import Inputs, Task
from ldm.config.assets import locate
from ldm.config.model_files import ModelFiles, downloaded_model
from ldm.config.model_info import ModelInfo
from ldm.io.image_formats import LOSSY, image_suffixes

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.generation import Sample
    from ldm.pipelines.semantic import SemanticToImage


class Semantic2Img(Task["SemanticToImage"]):
    """Sample images from label maps of any size."""

    name = "semantic2img"
    arguments = "--map data/semantic_examples/lake.png --seed 1"
    outdir = "outputs/semantic2img-samples"
    pipeline_path = "ldm.pipelines.semantic.SemanticToImage"
    published = "semantic_synthesis512"
    smaller = "semantic_synthesis256"

    def add_options(self, parser: Parser) -> None:
        """Add the maps, their colours and size, and the sampler."""
        parser.add_argument(
            "--map",
            nargs="+",
            required=True,
            metavar="FILE",
            help="PNG files, or folders of them: grey or palette images of labels, or with --palette in colour",
        )
        parser.add_argument(
            "--palette",
            metavar="FILE",
            help='the label of each colour: lines such as "#87ceeb 156 sky", or JSON {"#87ceeb": 156} (default: that '
            "of the model, if it has one)",
        )
        add_count(parser, "--n_samples", 1, "images a map")
        add_sampler(parser, 50)
        add_size(parser, "that of the map")

    def default_model(self) -> ModelFiles | None:
        """Return the larger of the two published models that were downloaded."""
        return super().default_model() or downloaded_model(self.smaller)

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> SemanticToImage:
        """See `Task.pipeline`."""
        from ldm.io.label_maps import read_palette
        from ldm.pipelines.semantic import SemanticToImage, label_count

        labels = label_count(info)
        file = args.palette or info.params.get("palette")
        palette = read_palette(locate(file)) if file else None
        return SemanticToImage(**sampler_settings(args), labels=labels, palette=palette, height=args.H, width=args.W)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each map, as often as the options ask for."""
        suffixes = image_suffixes(without=LOSSY)
        maps = [file_input("map", path) for path in named_files("--map", args.map, suffixes, "label maps")]
        return [each for each in maps for _ in range(args.n_samples)]

    def read(self, inputs: Inputs, pipeline: SemanticToImage) -> np.ndarray:
        """Return the map, in the size of the settings."""
        from ldm.io.label_maps import read_label_map
        from ldm.pipelines.semantic import check_labels

        path = unchanged("map", inputs)
        labels = read_label_map(path, pipeline.palette)
        check_labels(labels, pipeline.labels, f'the map "{path}"')
        return pipeline.fit(labels)

    def panels(self, sample: Sample, pipeline: SemanticToImage) -> list[np.ndarray]:
        """Return the map in colours."""
        from ldm.pipelines.semantic import label_colours

        return [label_colours(pipeline.labels, pipeline.palette)[sample.item.request]]


main = command_of(Semantic2Img())
