"""Classes of labelled boxes: which of a data set's classes a model learns, and their numbers.

A selection of classes is a list of names, a text file with one name a line, or the dotted path of a list in a module,
as published configurations give it. A mapping merges classes: it is a dictionary from id to id, a CSV file with two
columns, or the dotted path of a dictionary.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config.assets import locate
from ldm.config.targets import refusal, shown
from ldm.errors import UserError, did_you_mean
from ldm.io.layouts import read_labels
from ldm.io.text import read_lines

# The published code puts this class of OpenImages (Suitcase) behind the others.
LAST_ID = "/m/01s55n"
FILE_SUFFIXES = (".txt", ".csv", ".tsv", ".json")

Selection = str | Sequence[Any]


@dataclass(frozen=True)
class ObjectClasses:
    """Classes in the order of their numbers: sorted by their ids, as published."""

    ids: tuple[str, ...]
    names: tuple[str, ...]

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Number of each class by its id."""
        return {class_id: number for number, class_id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def numbers(self, ids: Iterable[str], mapping: Mapping[str, str]) -> np.ndarray:
        """Return the number of the class of each id after merging, -1 for ids that are not among the classes."""
        return np.array([self.number_of.get(mapping.get(each, each), -1) for each in ids], np.int32)


@dataclass(frozen=True)
class TopClasses:
    """Selection of the most frequent classes in the training boxes, and further classes by name.

    Attributes:
        count: number of the most frequent classes.
        also: names of further classes, where the data set has them.
    """

    count: int
    also: tuple[str, ...] = ()

    def choose(self, counts: Mapping[str, int]) -> list[tuple[str, int]]:
        """Return (name, number of boxes) of the selected classes, the most frequent ones first.

        Args:
            counts: number of training boxes of each class by name.
        """
        ranked = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
        wanted = {name.casefold() for name in self.also}
        return [*ranked[: self.count], *(each for each in ranked[self.count :] if each[0].casefold() in wanted)]


def choose_classes(
    known: Mapping[str, str], allowed: Iterable[str] | None, mapping: Mapping[str, str], source: str
) -> ObjectClasses:
    """Return the classes that a data set uses, numbered in the order of their ids.

    Args:
        known: name of each class of the data set by its id.
        allowed: names of the classes to use; None means all.
        mapping: id of a class → id of the class that it is merged into.
        source: name of the data set in messages.

    Raises:
        UserError: the data set lacks a name, or no class is left.
    """
    chosen = {class_id: name for class_id, name in known.items() if class_id not in mapping}
    if allowed is not None:
        names = set(allowed)
        unknown = sorted(names - set(known.values()))
        if unknown:
            hint = did_you_mean(unknown[0], sorted(known.values()))
            raise UserError(f'{source} has no class "{unknown[0]}"{hint} ({len(unknown)} names are unknown)')
        chosen = {class_id: name for class_id, name in chosen.items() if name in names}
    if not chosen:
        raise UserError(f"{source}: the selection leaves no class; check category_allow_list_target")
    ids = sorted(chosen, key=lambda class_id: (class_id == LAST_ID, class_id))
    return ObjectClasses(tuple(ids), tuple(chosen[class_id] for class_id in ids))


def load_selection(selection: Selection) -> list[str] | TopClasses | None:
    """Return the names of a selection of classes; None for an empty one, which means all classes.

    Raises:
        UserError: it cannot be found, or is not a list of names.
    """
    if isinstance(selection, str) and selection:
        selection = read_labels(locate(selection)) if _is_file(selection) else named_object(selection)
    if isinstance(selection, TopClasses):
        return selection
    entries: list[Any] = list(selection)
    names = [entry[0] if isinstance(entry, list | tuple) and entry else entry for entry in entries]
    if not all(isinstance(name, str) for name in names):
        raise UserError("category_allow_list_target must name classes: a text file with one name a line, or a list")
    return names or None


def load_mapping(mapping: str | Mapping[str, str]) -> dict[str, str]:
    """Return a mapping of ids of classes that are merged into others.

    Raises:
        UserError: it cannot be found, or is not a mapping of ids.
    """
    if isinstance(mapping, str):
        if not mapping:
            return {}
        mapping = _read_pairs(locate(mapping)) if _is_file(mapping) else named_object(mapping)
    if not isinstance(mapping, Mapping) or not all(isinstance(each, str) for pair in mapping.items() for each in pair):
        raise UserError("category_mapping_target must be a mapping from id to id, or a CSV file with two columns")
    return dict(mapping)


def merged_ids(parents: Mapping[str, str], ancestors: Iterable[str]) -> dict[str, str]:
    """Return the nearest of `ancestors` of each class below them, by ids; `parents` has the parent of each class."""
    chosen = set(ancestors)
    merged = {}
    for class_id in parents:
        above: str | None = class_id
        while above is not None and above not in chosen:
            above = parents.get(above)
        if above is not None and above != class_id:
            merged[class_id] = above
    return merged


def _is_file(text: str) -> bool:
    return text.lower().endswith(FILE_SUFFIXES) or "/" in text


def _read_pairs(path: Path) -> dict[str, str]:
    rows = [row for row in csv.reader(read_lines(path, "mapping of classes", "write lines such as FROM,TO")) if row]
    for row in rows:
        if len(row) != 2:
            raise UserError(f'the mapping of classes "{path}" has the line {shown(",".join(row))}; write FROM,TO')
    return {first.strip(): second.strip() for first, second in rows}


def named_object(target: str) -> Any:
    """Return the object at a dotted path of an allowed package.

    Raises:
        UserError: the path is refused, or nothing is there.
    """
    reason = refusal(target)
    if reason is not None:
        raise UserError(f"{shown(target)} {reason}")
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError):
        raise UserError(f"there is no list {shown(target)}; give a text file with one name a line") from None
