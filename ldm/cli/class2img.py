"""The command `class2img`: sample images of named classes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ldm.cli.class_task import ClassTask
from ldm.cli.command import Parser
from ldm.cli.options import add_count, add_sampler, sampler_settings
from ldm.cli.run import command_of
from ldm.cli.task import Inputs
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipelines.class_names import Classes
    from ldm.pipelines.classes import ClassToImage

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "cin256-v2": ("25", "187", "448", "992"),
    "emoji64": ("red heart", "fox", "rocket", "pizza"),
}


class Class2Img(ClassTask):
    """Sample images of classes."""

    name = "class2img"
    arguments = '--classes "red heart" fox --n_samples 4 --seed 1'
    outdir = "outputs/class2img-samples"
    published, bundled = "cin256-v2", "emoji64"

    def add_options(self, parser: Parser) -> None:
        """Add the classes and the sampler, with the defaults of the published notebook."""
        self.add_class_option(parser, "examples that suit the model")
        add_count(parser, "--n_samples", 6, "images of each class")
        add_sampler(parser, 20, scale=3.0)

    def pipeline(self, args: argparse.Namespace, info: ModelInfo) -> ClassToImage:
        """See `Task.pipeline`."""
        from ldm.pipelines.classes import ClassToImage

        classes_of(info)
        return ClassToImage(**sampler_settings(args), height=info.size.height, width=info.size.width)

    def inputs(self, args: argparse.Namespace, info: ModelInfo) -> list[Inputs]:
        """Return each class, as often as the options ask for."""
        classes = classes_of(info)
        first = [str(label) for label in range(min(4, classes.count))]
        labels = classes.parse(args.classes or EXAMPLES.get(info.name, first))
        return [self.class_inputs(classes, label) for label in labels for _ in range(args.n_samples)]

    def default_batch_size(self, args: argparse.Namespace) -> int:
        """Return the number of images of a class."""
        return args.n_samples

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return the number of images of a class."""
        return args.n_samples


def classes_of(info: ModelInfo) -> Classes:
    """Return the classes of a model.

    Raises:
        UserError: The model has no classes.
    """
    from ldm.pipelines.class_names import Classes

    classes = Classes.of(info)
    if classes is None:
        raise UserError(f'the model "{info.name}" has no classes; sample from it with sample_diffusion')
    return classes


main = command_of(Class2Img())
