"""What a picture says of itself: text chunks of its PNG, for people, and one entry from which it is drawn again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.cli.options import MAX_SEED, PRECISIONS
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError

KEY = "ldm"  # the text chunk that holds everything


@dataclass(frozen=True)
class Place:
    """Where in its run a picture was drawn. The last bits of a result depend on the size of its batch."""

    index: int = 0  # among the run's pictures
    position: int = 0  # in its batch
    batch: int = 1  # pictures in that batch


@dataclass(frozen=True)
class Origin:
    """How the pictures of a run came to be."""

    task: str
    model: str
    config: str  # the model's files, relative to the working folder where they are inside it
    checkpoint: str
    precision: str
    version: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, task: str, files: ModelFiles, precision: str, settings: Mapping[str, Any]) -> Origin:
        """The origin of what the model in `files` draws with this version."""
        config, checkpoint = (_relative(path) for path in (files.config, files.checkpoint))
        return cls(task, files.name, config, checkpoint, precision, release(), settings)

    def text(self, inputs: Mapping[str, Any], seed: int, place: Place) -> dict[str, Any]:
        """The text chunks of one picture."""
        own = {**inputs, "seed": seed, "index": place.index}
        run = {"task": self.task, "model": self.model, "precision": self.precision, "version": self.version}
        record = {**asdict(self), "inputs": dict(inputs), "seed": seed, "place": asdict(place)}
        return {**own, **self.settings, **run, KEY: json.dumps(record)}

    def sheet_text(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The text chunks of the sheet of all pictures: each thing that they were drawn from once, line by line."""
        names = dict.fromkeys(name for each in inputs for name in each)
        lines = {name: "\n".join(dict.fromkeys(str(each[name]) for each in inputs if name in each)) for name in names}
        return {**lines, **self.settings, "task": self.task, "model": self.model, "version": self.version}


@dataclass(frozen=True)
class Record:
    """What it takes to draw a picture again."""

    origin: Origin
    inputs: dict[str, Any]
    seed: int
    place: Place

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Record:
        """The record in a PNG.

        Raises:
            UserError: it is no PNG, or has no such record.
        """
        from PIL import Image

        try:
            with Image.open(path) as file:
                text = getattr(file, "text", {}).get(KEY)
        except FileNotFoundError:
            raise UserError(f'there is no picture "{path}"; check the path') from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f'cannot read the picture "{path}": {error}; give a PNG that a command here wrote'
            ) from None
        if text is None:
            raise UserError(f'"{path}" does not say how it was drawn; give a single picture that a command here wrote')
        try:
            record = json.loads(text)
            inputs, seed, place = record.pop("inputs"), record.pop("seed"), Place(**record.pop("place"))
            origin = Origin(**record)
            if not (isinstance(inputs, dict) and isinstance(seed, int) and isinstance(origin.settings, dict)):
                raise TypeError("wrong types")
            if not 0 <= place.position < place.batch:
                raise ValueError("its place is not in its batch")
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"its seed is not between 0 and {MAX_SEED}")
            if origin.precision not in PRECISIONS:
                raise ValueError(f'its precision is "{origin.precision}"')
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'what "{path}" says of its drawing is damaged: {error}') from None
        return cls(origin, inputs, seed, place)


def release() -> str:
    """The version of this package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"ldm {version('ldm')}"
    except PackageNotFoundError:
        return "ldm"


def _relative(path: Path) -> str:
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
