"""Text files of a model for its own folder: its vocabulary, the names of its classes, and its palette."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.assets import locate
from ldm.config.model_texts import CLASS_NAMES, PALETTE, VOCABULARY, named_texts, replaced
from ldm.errors import UserError
from ldm.io.files import atomic_path
from ldm.io.label_maps import read_palette
from ldm.io.text import read_text
from ldm.modules.encoders.modules import TOKENIZER_FILE, find_vocabulary
from ldm.pipelines.class_names import IMAGENET, read_class_names

NAMES = {CLASS_NAMES: "class_names.txt", VOCABULARY: "vocab.txt", PALETTE: "palette.txt"}
MAX_BYTES = 16 << 20  # of a text file; the largest known vocabulary has 2 MB


@dataclass(frozen=True)
class ModelText:
    """Text file to write into the folder of a model.

    Attributes:
        name: its name in the folder.
        source: the file that it is copied from.
        text: its content.
    """

    name: str
    source: Path
    text: str

    def write(self, folder: Path, replace: bool) -> None:
        """Write the file; an existing one with the same content stays.

        Raises:
            UserError: another file of this name exists and may not be replaced.
        """
        path = folder / self.name
        if path.is_file() and not replace:
            if read_text(path, "text file") == self.text:
                return
            raise UserError(f'"{path}" exists with other content; choose another --outdir, or give --overwrite')
        with atomic_path(path, replace=replace) as temporary:
            temporary.write_text(self.text, encoding="utf-8", newline="\n")


def collect_texts(model: Mapping[str, Any]) -> tuple[dict[str, Any], list[ModelText]]:
    """Return the configuration of a model that names its text files as they lie in its own folder, and these files.

    A vocabulary on the Hugging Face hub and the classes "imagenet" keep their names.

    Args:
        model: `target` and `params` of the model.

    Raises:
        UserError: a file is missing, is not text, or is no vocabulary, palette or list of classes of this model.
    """
    config, texts = dict(model), []
    for keys, value in named_texts(model):
        source = _find(keys, value)
        if source is None:
            continue
        text = _read(source)
        if keys == CLASS_NAMES:
            _check_class_names(model, str(source))
        elif keys == PALETTE:
            read_palette(source)
        name = _name_in_folder(keys, source)
        texts.append(ModelText(name, source, text))
        config = replaced(config, keys, name)
    return config, texts


def _name_in_folder(keys: tuple[str, ...], source: Path) -> str:
    """Return the name of a file in the folder of its model; the suffix of JSON files decides how they are read."""
    if keys == VOCABULARY and source.name == TOKENIZER_FILE:
        return TOKENIZER_FILE
    return "palette.json" if keys == PALETTE and source.suffix.lower() == ".json" else NAMES[keys]


def _find(keys: tuple[str, ...], value: str) -> Path | None:
    """Return the file that the value of a key names, or None if it names something else."""
    if keys == VOCABULARY:
        return find_vocabulary(value)
    return None if value == IMAGENET else locate(value)


def _read(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: it is missing, is not text, or is too large to be a list of words or names.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f'"{path}" is too large for a list of words or names; name a text file in the configuration')
    return read_text(path, "text file of the model")


def _check_class_names(model: Mapping[str, Any], source: str) -> None:
    """Raise an error if a file does not hold the names of a model's classes.

    Raises:
        UserError: the number of names differs from that of the classes.
    """
    params = model["params"]
    stage = params.get("cond_stage_config")
    inner = stage.get("params") if isinstance(stage, Mapping) else None
    labels = (inner or {}).get("n_classes")
    count = len(read_class_names(source))
    if isinstance(labels, int) and count not in (labels - 1, labels):
        raise UserError(
            f'the file of class names "{source}" has {count} names, the model {labels} classes; '
            "name the right file as class_names"
        )
