"""The command `layout2img`: sample images from layouts of labelled boxes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ldm.cli.command import Parser
from ldm.cli.input_files import named_files
from ldm.cli.options import add_count, add_sampler, sampler_settings
from ldm.cli.run import command_of
from ldm.cli.task import Inputs, Task
from ldm.config.assets import locate
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.pipelines.generation import Sample
    from ldm.pipelines.layout import Layout, LayoutToImage


class Layout2Img(Task["LayoutToImage"]):
    """Sample images from layouts of labelled boxes."""

    name = "layout2img"
    arguments = "--layout data/layout_examples --labels class-descriptions-boxable.csv --seed 1"
    outdir = "outputs/layout2img-samples"
    pipeline_path = "ldm.pipelines.layout.LayoutToImage"
    published = "layout2img-openimages256"

    def add_options(self, parser: Parser) -> None:
        """Add the layouts, the class names and the sampler."""
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
            help="class names of the model in their order, one a line, or a CSV file with names in the last column "
            "(default: class_names of the model's configuration; without them, labels are numbers)",
        )
        add_count(parser, "--n_samples", 1, "images a layout")
        add_sampler(parser, 200, scale=1.0)

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> LayoutToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.layout import LayoutToImage

        return LayoutToImage(**sampler_settings(args))

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each layout, as often as the options ask for; an error in one is reported when its turn comes."""
        from ldm.io.layouts import read_labels, read_layouts
        from ldm.pipelines.layout import class_names_of, layout_vocabulary

        names = read_labels(locate(args.labels)) if args.labels else class_names_of(info)
        vocabulary = layout_vocabulary(info)
        found: list[Inputs] = []
        for path in named_files("--layout", args.layout, (".json",), "layouts in JSON"):
            try:
                layouts = read_layouts(path)
            except UserError as error:
                found.append({"layout": str(path), "error": str(error)})
                continue
            for number, layout in enumerate(layouts, 1):
                where = str(path) if len(layouts) == 1 else f"{path} #{number}"
                found += _described(where, layout, names, vocabulary, args.n_samples)
        if all("error" in each for each in found):
            raise UserError(found[0]["error"])  # before a model is loaded for nothing
        return found

    def read(self, inputs: Inputs, pipeline: Any) -> Layout:
        """Return the layout."""
        from ldm.pipelines.layout import LabelledBox, Layout

        if "error" in inputs:
            raise UserError(inputs["error"])
        boxes = (LabelledBox(each["label"], tuple(each["box"]), each["name"]) for each in inputs["boxes"])
        return Layout(tuple(boxes))

    def panels(self, sample: Sample, pipeline: Any) -> list[np.ndarray]:
        """Return the boxes with their labels."""
        from ldm.io.grids import draw_boxes
        from ldm.io.pixels import to_uint8

        height, width, _ = sample.image.shape
        boxes = sample.item.request.boxes
        names = [each.name for each in boxes]
        return [to_uint8(draw_boxes((width, height), [each.box for each in boxes], names, max(height // 25, 8)))]


def _described(where: str, layout: Any, names: Sequence[str], vocabulary: tuple[int, int], count: int) -> list[Inputs]:
    """Return the inputs of `count` images of a layout, or one entry with its error."""
    from ldm.io.layouts import resolve
    from ldm.pipelines.layout import as_layout, layout_tokens

    try:
        layout_tokens(as_layout(layout, names), *vocabulary)
        return count * [{"layout": where, **resolve(layout, names)}]
    except UserError as error:
        return [{"layout": where, "error": f'"{where}": {error}'}]


main = command_of(Layout2Img())
