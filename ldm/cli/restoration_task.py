"""Base class of the tasks that restore images: one result for each image, named after it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.command import Parser
from ldm.cli.options import non_negative_int
from ldm.cli.task import Inputs, Task


class RestorationTask(Task):
    """Restore images."""

    def add_tile_option(self, parser: Parser, default: int | None, what: str) -> None:
        """Add the side of the tiles that large images are sampled in."""
        parser.add_argument("--tile", type=non_negative_int, default=default, metavar="PIXELS", help=what)

    def path(self, outdir: Path, inputs: Inputs, number: int) -> Path:
        """Return a path with the name of the image, which replaces an earlier result, as published."""
        return outdir / f"{inputs['name']}.png"

    def grid_columns(self, args: argparse.Namespace) -> int:
        """Return 2: each image stands beside its result."""
        return 2
