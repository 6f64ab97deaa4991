"""Text files that the configuration of a model names: its vocabulary, the names of its classes, and its palette.

A model folder holds them beside `config.yaml`, so that it works in every place. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Keys below the section `model` whose value may be the path of a text file.
CLASS_NAMES = ("params", "class_names")
VOCABULARY = ("params", "cond_stage_config", "params", "vocab")
PALETTE = ("params", "palette")
TEXTS = (CLASS_NAMES, VOCABULARY, PALETTE)


def named_texts(model: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the keys of a model's configuration that name a text file, each with its value.

    The value may also be another name, such as "imagenet" or that of a vocabulary on the Hugging Face hub.
    """
    for keys in TEXTS:
        node: Any = model
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, str) and node:
            yield keys, node


def with_own_texts(model: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the configuration of a model with the text files that lie in its own folder as absolute paths.

    Other paths stay as they are. So does a path that leaves the folder, which the search path of the project resolves.

    Args:
        model: `target` and `params` of the model.
        folder: the folder of the configuration.
    """
    result = dict(model)
    for keys, value in named_texts(model):
        path = Path(value)
        if not path.is_absolute() and ".." not in path.parts and (folder / path).is_file():
            result = replaced(result, keys, os.path.abspath(folder / path))
    return result


def replaced(mapping: Mapping[str, Any], keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return a nested mapping with another value for the last of `keys`; the original stays as it is."""
    first, *rest = keys
    return {**mapping, first: replaced(mapping[first], tuple(rest), value) if rest else value}
