"""Layers of a configuration: a later one replaces values of the earlier ones, and removes keys with `~key`.

A removal is a key such as `~latent_cache:` without a value, at the position of the key that it removes. It applies to
the earlier layers, before the values of its own layer. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from ldm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

MARK = "~"


def merge_layer(base: DictConfig, layer: DictConfig) -> DictConfig:
    """Return `base` without the keys that `layer` removes, and with its values.

    Raises:
        UserError: there is no such key to remove, or a removal has a value.
        OmegaConfBaseException: the two cannot be merged.
    """
    from omegaconf import OmegaConf

    content = _plain(layer)
    removals = list(_pop_removals(content, ()))
    if not removals:
        return cast("DictConfig", OmegaConf.merge(base, layer))
    remaining = _plain(base)
    for keys in removals:
        _remove(remaining, keys)
    return cast("DictConfig", OmegaConf.merge(OmegaConf.create(remaining), OmegaConf.create(content)))


def section_name(key: object) -> str:
    """Return the name of the section that a key at the top of a layer sets or removes."""
    return str(key).removeprefix(MARK)


def assignment(word: str) -> str:
    """Return a word of the command line as `key.sub=value`; `~key.sub` becomes a removal in that form."""
    if not word.startswith(MARK) or "=" in word:
        return word
    parents, dot, key = word.removeprefix(MARK).rpartition(".")
    return f"{parents}{dot}{MARK}{key}=null"


def _plain(config: DictConfig) -> dict[Any, Any]:
    from omegaconf import OmegaConf

    content = OmegaConf.to_container(config, resolve=False)
    return content if isinstance(content, dict) else {}


def _pop_removals(mapping: dict[Any, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Remove the removals from a layer, and yield the keys that they remove."""
    for key, value in list(mapping.items()):
        if isinstance(key, str) and key.startswith(MARK):
            keys = (*above, key.removeprefix(MARK))
            if value is not None:
                raise UserError(f'"{".".join((*above, key))}" removes a key and takes no value; write "{key}:" alone')
            del mapping[key]
            yield keys
        elif isinstance(value, dict):
            yield from _pop_removals(value, (*above, str(key)))


def _remove(mapping: dict[Any, Any], keys: tuple[str, ...]) -> None:
    """Remove a key of a nested mapping.

    Raises:
        UserError: there is no such key.
    """
    node: Any = mapping
    for depth, name in enumerate(keys):
        known = {str(key): key for key in node} if isinstance(node, dict) else {}
        if name not in known:
            missing, above = ".".join(keys[: depth + 1]), keys[:depth]
            near = did_you_mean(missing, (".".join((*above, key)) for key in known))
            raise UserError(
                f'cannot remove {MARK}{".".join(keys)}: there is no key "{missing}"{near}; '
                "a removal applies to earlier configurations"
            )
        if depth == len(keys) - 1:
            del node[known[name]]
        else:
            node = node[known[name]]
