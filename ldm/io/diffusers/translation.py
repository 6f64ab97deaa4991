"""Translate the names and shapes of weights between this package and diffusers, by a table of layers.

A layer is named by a prefix of its weights' names, such as `out.0.`; the rest, `weight` or `bias`, is the same in both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """Layer of this package, and the layers of diffusers with the same weights.

    Several layers of diffusers, such as the projections to queries, keys and values, are stacked to one of ours.

    Attributes:
        ours: prefix of the names of its weights.
        theirs: prefixes of the names in diffusers.
        older: the prefixes that earlier versions of diffusers wrote.
        dims: dimensions of size 1 that only our weights have; 2 for a convolution that is a linear layer in diffusers.
        heads: number of attention heads; the rows of stacked layers alternate after the rows of each head.
    """

    ours: str
    theirs: tuple[str, ...]
    older: tuple[str, ...] = ()
    dims: int = 0
    heads: int = 1

    def stack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return our weights from those of diffusers, one tensor for each of `theirs`."""
        value = parts[0]
        if len(parts) > 1:
            rows = [part.reshape(self.heads, -1, *part.shape[1:]) for part in parts]
            value = torch.stack(rows, dim=1).flatten(0, 2)
        return value.reshape(*value.shape[:2], *[1] * self.dims) if self.dims and value.dim() > 1 else value

    def split(self, value: Tensor) -> list[Tensor]:
        """Return the weights of diffusers, one tensor for each of `theirs`, from ours."""
        value = value.flatten(1) if self.dims and value.dim() > 1 else value
        if len(self.theirs) == 1:
            return [value]
        rows = value.reshape(self.heads, len(self.theirs), -1, *value.shape[1:])
        return [part.flatten(0, 1) for part in rows.unbind(dim=1)]

    def part(self, index: int, value: Tensor) -> Tensor:
        """Return the weight of diffusers at `index` of `theirs`, from ours."""
        return self.split(value)[index]


class Translation:
    """Translation of a state dict by the layers of its model."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        layers = list(layers)
        self._ours = {layer.ours: (layer, 0) for layer in layers}
        names = [(layer, names) for layer in layers for names in (layer.older, layer.theirs)]
        self._theirs = {name: (layer, i) for layer, each in names for i, name in enumerate(each)}

    def to_ours(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of diffusers in our form; names without a counterpart stay as they are."""
        parts: dict[tuple[Layer, str], dict[int, Tensor]] = defaultdict(dict)
        found, names = {}, {}
        for name, value in weights.items():
            hit = _longest_prefix(self._theirs, name)
            if hit is None:
                found[name] = value
                continue
            layer, index, rest = hit
            parts[layer, rest][index] = value
            names[layer, rest, index] = name
        for (layer, rest), values in parts.items():
            if len(values) == len(layer.theirs):
                found[layer.ours + rest] = layer.stack([values[i] for i in sorted(values)])
            else:
                found |= {names[layer, rest, index]: value for index, value in values.items()}
        return found

    def to_theirs(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return our weights in the form of diffusers.

        Raises:
            KeyError: a name has no counterpart.
        """
        found: dict[str, Tensor] = {}
        for name, value in weights.items():
            layer, rest = self._layer(name)
            found |= {part + rest: piece for part, piece in zip(layer.theirs, layer.split(value), strict=True)}
        return found

    def their_names(self, name: str) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """Return the names of diffusers for our weight `name`, each with the function that selects its rows of ours.

        Raises:
            KeyError: it has no counterpart.
        """
        layer, rest = self._layer(name)
        return [(part + rest, partial(layer.part, index)) for index, part in enumerate(layer.theirs)]

    def _layer(self, name: str) -> tuple[Layer, str]:
        hit = _longest_prefix(self._ours, name)
        if hit is None:
            raise KeyError(name)
        layer, _, rest = hit
        return layer, rest


def _longest_prefix(table: Mapping[str, tuple[Layer, int]], name: str) -> tuple[Layer, int, str] | None:
    for end in range(len(name), 0, -1):
        if name[:end] in table:
            layer, index = table[name[:end]]
            return layer, index, name[end:]
    return None
