"""Class to image."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ldm.cli.command import Parser
from ldm.cli.options import positive_int
from ldm.config.model_config import read_config
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.tasks.classes import Classes, ClassTask
from ldm.tasks.task import Inputs, Settings

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "cin256-v2": ("25", "187", "448", "992"),
    "emoji64": ("red heart", "fox", "rocket", "pizza"),
}


class ClassToImage(ClassTask):
    """Draw pictures of classes."""

    name = "class2img"
    example = 'python scripts/class2img.py --classes "red heart" fox --n_samples 4 --seed 1'
    outdir = "outputs/class2img-samples"
    published, bundled = "cin256-v2", "emoji64"

    def add_options(self, parser: Parser) -> None:
        """Their defaults are those of the published notebook."""
        self.class_option(parser, "examples that suit the model")
        parser.add_argument(
            "--n_samples", type=positive_int, default=6, metavar="N", help="pictures of each (default: %(default)s)"
        )
        self.sampler_options(parser, steps=20, scale=3.0)

    def settings(self, args: argparse.Namespace, files: ModelFiles, config: Mapping[str, Any]) -> Settings:
        """Sampler and size."""
        self._classes(files, config).check_scale(args.scale)
        return {**self.sampler_settings(args, config), **self.size(config)}

    def inputs(self, args: argparse.Namespace, files: ModelFiles) -> list[Inputs]:
        """Each class as often as asked."""
        classes = self._classes(files, read_config(files.config))
        few = [str(label) for label in range(min(4, classes.count))]
        labels = classes.parse(args.classes or EXAMPLES.get(files.name, few))
        return [classes.inputs(label) for label in labels for _ in range(args.n_samples)]

    def _classes(self, files: ModelFiles, config: Mapping[str, Any]) -> Classes:
        classes = Classes.of(files.name, config)
        if classes is None:
            raise UserError(f'the model "{files.name}" has no classes; draw from it with scripts/sample_diffusion.py')
        return classes

    def default_batch(self, args: argparse.Namespace) -> int:
        """A class."""
        return args.n_samples

    def sheet_columns(self, args: argparse.Namespace) -> int:
        """A class is a row."""
        return args.n_samples
