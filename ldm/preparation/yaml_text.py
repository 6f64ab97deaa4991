"""YAML text with comments, from nested mappings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

INDENT = "  "


@dataclass(frozen=True)
class Note:
    """Value with a comment.

    Attributes:
        value: the value.
        text: the comment, at the end of the line.
    """

    value: Any
    text: str


def to_yaml(mapping: Mapping[str, Any], comment: str = "") -> str:
    """Return a nested mapping as YAML. Lists, and mappings in lists, are written in one line.

    Args:
        mapping: keys → values, mappings, or a `Note` with one of these.
        comment: lines above the mapping.
    """
    head = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join([*head, *_lines(mapping, "")]) + "\n"


def plain(value: Any) -> Any:
    """Return a nested mapping without its comments."""
    if isinstance(value, Note):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def _lines(mapping: Mapping[str, Any], indent: str) -> Iterator[str]:
    for number, (key, value) in enumerate(mapping.items()):
        if number and not indent:
            yield ""  # between sections
        text = f"  # {value.text}" if isinstance(value, Note) else ""
        inner = value.value if isinstance(value, Note) else value
        if isinstance(inner, Mapping) and inner:
            yield f"{indent}{_scalar(key)}:{text}"
            yield from _lines(inner, indent + INDENT)
        else:
            yield f"{indent}{_scalar(key)}: {_scalar(inner)}{text}"


def _scalar(value: Any) -> str:
    """Return a value without nesting as YAML in one line."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
