"""Base class of the tasks that sample classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.cli.command import Parser
from ldm.cli.task import Inputs, Task

if TYPE_CHECKING:
    from ldm.pipelines.class_names import Classes
    from ldm.pipelines.classes import ClassRequest, ClassToImage


class ClassTask(Task["ClassToImage"]):
    """Sample images of classes."""

    pipeline_path = "ldm.pipelines.classes.ClassToImage"

    def add_class_option(self, parser: Parser, default: str) -> None:
        """Add the classes; `default` describes what applies without the option."""
        parser.add_argument(
            "--classes",
            nargs="+",
            metavar="CLASS",
            help=f"names, numbers, ranges such as 0-9 (default: {default})",
        )

    def class_inputs(self, classes: Classes, label: int) -> Inputs:
        """Return the inputs of an image of a class."""
        return {"class_label": label, "class": classes.name(label)}

    def read(self, inputs: Inputs, pipeline: ClassToImage) -> ClassRequest | None:
        """Return the class; None for an unconditional model."""
        from ldm.pipelines.classes import ClassRequest

        return ClassRequest(inputs["class_label"], inputs["class"]) if "class_label" in inputs else None
