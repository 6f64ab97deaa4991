"""Metadata of images: text chunks of their PNG files for people, and one record from which `replay` samples again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.options import MAX_SEED
from ldm.config.distribution import version
from ldm.config.model_files import ModelFiles
from ldm.config.values import PRECISIONS
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.pipelines.generation import BatchPosition

KEY = "ldm"  # the text chunk that holds the record
ADDITIONS = ("vae", "loras", "embeddings")  # facts that most records lack


class GridError(UserError):
    """The file is a grid of images, which has no record."""


@dataclass(frozen=True)
class RunInfo:
    """Facts that all images of a run share.

    Attributes:
        task: name of the command.
        model: name of the model.
        config, checkpoint: its files, relative to the working folder if they are inside it.
        precision: dtype of the network.
        version: of this package.
        settings: settings of the pipeline.
        vae: file of a first stage that replaces that of the model; None for its own.
        loras: LoRA files that are merged into the model, and their factors.
        embeddings: files of textual inversions, and tokens to use instead of theirs.
    """

    task: str
    model: str
    config: str
    checkpoint: str
    precision: str
    version: str
    settings: Mapping[str, Any]
    vae: str | None = None
    loras: Sequence[tuple[str, float]] = ()
    embeddings: Sequence[tuple[str, str | None]] = ()

    @classmethod
    def of(cls, task: str, files: ModelFiles, precision: str, settings: Mapping[str, Any]) -> RunInfo:
        """Return the facts of a run with the model in `files` and this version."""
        config, checkpoint = (_relative(path) for path in (files.config, files.checkpoint))
        vae = None if files.vae is None else _relative(files.vae)
        loras = [(_relative(path), factor) for path, factor in files.loras]
        words = [(_relative(path), token) for path, token in files.embeddings]
        return cls(task, files.name, config, checkpoint, precision, release(), settings, vae, loras, words)

    def text(self, inputs: Mapping[str, Any], seed: int, position: BatchPosition) -> dict[str, Any]:
        """Return the text chunks of one image."""
        own = {**inputs, "seed": seed, "index": position.index}
        run = {"task": self.task, "model": self.model, "precision": self.precision, "version": self.version}
        if self.vae is not None:
            run["vae"] = self.vae
        if self.loras:
            run["loras"] = ", ".join(f"{path}:{factor:g}" for path, factor in self.loras)
        if self.embeddings:
            run["embeddings"] = ", ".join(f"{path}:{token}" if token else path for path, token in self.embeddings)
        facts = {name: value for name, value in asdict(self).items() if value or name not in ADDITIONS}
        record = {**facts, "inputs": dict(inputs), "seed": seed, "place": asdict(position)}
        settings = {name: value for name, value in self.settings.items() if value is not None}
        return {**own, **settings, **run, KEY: json.dumps(record)}

    def sheet_text(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the text chunks of the grid of all images: each distinct input once, line by line."""
        names = dict.fromkeys(name for each in inputs for name in each)
        lines = {name: "\n".join(dict.fromkeys(str(each[name]) for each in inputs if name in each)) for name in names}
        return {**lines, **self.settings, "task": self.task, "model": self.model, "version": self.version}


@dataclass(frozen=True)
class Record:
    """Everything that is needed to sample an image again."""

    run: RunInfo
    inputs: dict[str, Any]
    seed: int
    position: BatchPosition

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Record:
        """Read the record in a PNG file.

        Raises:
            UserError: The file is not a PNG, or has no valid record.
        """
        from ldm.io.image_metadata import read_png_texts
        from ldm.io.images import decode_image

        decode_image(path, advice="give a PNG that a command of this project wrote")  # before anything is sampled
        chunks = read_png_texts(path, (KEY, "task"))
        text = chunks.get(KEY)
        if text is None and "task" in chunks:
            raise GridError(f'"{path}" is a grid; give a single image')
        if text is None:
            raise UserError(f'"{path}" has no settings; give a single image that a command of this project wrote')
        try:
            return cls._parsed(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'the settings in "{path}" are damaged: {error}') from None

    @classmethod
    def _parsed(cls, record: dict[str, Any]) -> Record:
        from ldm.pipelines.generation import BatchPosition

        inputs, seed, position = record.pop("inputs"), record.pop("seed"), BatchPosition(**record.pop("place"))
        run = RunInfo(**record)
        if not (isinstance(inputs, dict) and isinstance(seed, int) and isinstance(run.settings, dict)):
            raise TypeError("wrong types")
        if not all(isinstance(text, str) for text in (run.task, run.model, run.config, run.checkpoint)):
            raise TypeError("wrong types")
        if not isinstance(run.vae, str | None) or not all(_is_lora(lora) for lora in run.loras):
            raise TypeError("wrong types")
        if not all(_is_embedding(embedding) for embedding in run.embeddings):
            raise TypeError("wrong types")
        if not 0 <= position.position < position.batch:
            raise ValueError("the position is outside the batch")
        start_seed = inputs.get("start_seed", seed)
        if not all(isinstance(each, int) and 0 <= each <= MAX_SEED for each in (seed, start_seed)):
            raise ValueError(f"the seed is not between 0 and {MAX_SEED}")
        if run.precision not in PRECISIONS:
            raise ValueError(f'the precision is "{run.precision}"')
        return cls(run, inputs, seed, position)


def _is_lora(entry: Any) -> bool:
    """Return whether an entry of a record is a file and a factor."""
    return isinstance(entry, list) and [type(value) for value in entry] in ([str, float], [str, int])


def _is_embedding(entry: Any) -> bool:
    """Return whether an entry of a record is a file and a token or None."""
    return (
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], str | None)
    )


def release() -> str:
    """Return the name and the version of this package."""
    return f"ldm {version()}"


def _relative(path: Path) -> str:
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
