"""Read the entries of a configuration of diffusers: checks, and the form of lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from ldm.errors import UserError

# Entries that are whole numbers above 0, or lists of them, in all parts of a model.
COUNTS = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "d_model",
    "encoder_layers",
    "hidden_size",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "max_position_embeddings",
    "num_attention_heads",
    "num_class_embeds",
    "num_hidden_layers",
    "num_train_timesteps",
    "num_vq_embeddings",
    "out_channels",
    "sample_size",
    "transformer_layers_per_block",
    "vocab_size",
    "vq_embed_dim",
)
# Entries that are numbers.
NUMBERS = ("beta_end", "beta_start", "norm_eps", "scaling_factor")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a folder in the form of diffusers.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f'there is no "{path}"; copy or download the whole folder of the model') from None
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f'"{path}" is damaged ({reason}); download or copy it again') from None
    if not isinstance(content, dict):
        raise UserError(f'"{path}" is damaged (it holds no names and values); download or copy it again')
    return content


def check_types(config: Mapping[str, Any], where: str) -> None:
    """Raise an error if an entry is not a number of its kind. Entries may be missing or null.

    Args:
        config: entries of a part of a model.
        where: name of the configuration in the message.

    Raises:
        UserError: an entry is something else.
    """
    for keys, fits, kind in ((COUNTS, _is_count, "a whole number above 0"), (NUMBERS, _is_number, "a number")):
        for key in keys:
            value = config.get(key)
            if value is not None and not fits(value):
                raise UserError(f'{where}: "{key}" is {value!r}, not {kind}; download or copy the file again')


def _is_count(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_count(each) for each in value)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Raise an error if an entry has another value than the one that the networks of this package implement.

    Args:
        config: entries of a part of a model.
        fixed: the value of each entry; an entry that is missing has it.
        where: name of the configuration in the message.

    Raises:
        UserError: an entry has another value.
    """
    for key, value in fixed.items():
        given = config.get(key, value)
        if given != value and not (value is None and given is False):
            raise UserError(f'{where}: "{key}" is {given!r}; only models with {value!r} can be loaded')


def required(config: Mapping[str, Any], key: str, where: str) -> Any:
    """Return an entry.

    Raises:
        UserError: it is missing.
    """
    if config.get(key) is None:
        raise UserError(f'{where}: "{key}" is missing; download or copy the file again')
    return config[key]


def one_value(values: Any) -> Any:
    """Return the value of a list of equal values, and anything else as it is."""
    return values[0] if isinstance(values, Sequence) and values and all(v == values[0] for v in values) else values


def multiples(channels: Sequence[int], where: str) -> list[int]:
    """Return the channels of each level as multiples of those of the first one.

    Raises:
        UserError: they are not multiples.
    """
    if any(each % channels[0] for each in channels):
        raise UserError(f'{where}: "block_out_channels" {list(channels)} are not multiples of the first one')
    return [each // channels[0] for each in channels]


def attention_levels(config: Mapping[str, Any], blocks: Mapping[str, bool], levels: int, where: str) -> list[bool]:
    """Return for each level, from the highest resolution, whether it has attention.

    Args:
        config: entries with `down_block_types` and `up_block_types`.
        blocks: attention by the name of a block, in both directions.
        levels: number of levels.
        where: name of the configuration in the message.

    Raises:
        UserError: a block is unknown, or the two directions differ.
    """
    down, up = (list(required(config, f"{side}_block_types", where)) for side in ("down", "up"))
    for name in (*down, *up):
        if name not in blocks:
            raise UserError(f'{where}: the block "{name}" is not supported; supported are {", ".join(blocks)}')
    attention = [blocks[name] for name in down]
    if attention != [blocks[name] for name in reversed(up)] or len(attention) != levels:
        raise UserError(f"{where}: the levels of the encoder and of the decoder differ, which is not supported")
    return attention
