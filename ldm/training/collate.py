"""Batches from the items of a data set, with errors that name what cannot be batched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ldm.errors import UserError

FROM_PIL = "np.asarray(image, dtype=np.float32) / 127.5 - 1"


class Collate:
    """`collate_fn` of a data loader: PyTorch's default one, with errors that a user can act on.

    Entries that are lists of named tuples, such as the annotations of boxes, stay one list for each item.

    Args:
        name: name of the data set in messages, such as "data.params.train".
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, items: list[Any]) -> Any:
        """Return the batch of the items.

        Raises:
            UserError: the items cannot be batched.
        """
        records = [key for key, value in items[0].items() if _is_records(value)] if _are_mappings(items) else []
        if records:
            others = [{key: value for key, value in item.items() if key not in records} for item in items]
            return {**(self(others) if others[0] else {}), **{key: [item[key] for item in items] for key in records}}
        try:
            return default_collate(items)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            fault = find_fault(items, "an item")
            if fault is None:  # e.g. a lack of shared memory
                raise
            raise UserError(f"{self.name}: {fault}") from error


def _are_mappings(items: list[Any]) -> bool:
    """Return whether all items are mappings with the same keys."""
    return all(isinstance(item, Mapping) and item.keys() == items[0].keys() for item in items)


def _is_records(value: Any) -> bool:
    """Return whether a value is a list of named tuples."""
    return isinstance(value, list) and bool(value) and all(hasattr(each, "_fields") for each in value)


def find_fault(values: Sequence[Any], where: str) -> str | None:
    """Return text that says why values of several items cannot be batched, or None if no reason is found.

    Args:
        values: one value of each item.
        where: name of the value in the text, such as `"image" of an item`.
    """
    if any(value is None for value in values):
        return f"{where} is None; return a value in every item, and leave damaged items out of the data set"
    first = values[0]
    other = next((value for value in values if _kind(value) != _kind(first)), None)
    if other is not None:
        return f"{where} is {describe(first)}, and that of another item {describe(other)}; return the same type in all"
    if isinstance(first, Image.Image):
        return f'{where} is {describe(first)}; return {FROM_PIL}, with image.convert("RGB") before if it is not RGB'
    if isinstance(first, Mapping):
        return _mapping_fault(values)
    if isinstance(first, Tensor | np.ndarray):
        return _array_fault(values, where)
    if isinstance(first, list | tuple):
        return _list_fault(values, where)
    if isinstance(first, str | bytes | bool | int | float):
        return None
    return f"{where} is {describe(first)}, which cannot be batched; return an array, a number or a text"


def _mapping_fault(items: Sequence[Mapping[Any, Any]]) -> str | None:
    for key in items[0]:
        if any(key not in item for item in items):
            return f"some items have no {_quoted(key)}, which others have; return the same keys in every item"
    faults = (find_fault([item[key] for item in items], f"{_quoted(key)} of an item") for key in items[0])
    return next(filter(None, faults), None)


def _array_fault(values: Sequence[Any], where: str) -> str | None:
    shapes = list(dict.fromkeys(tuple(value.shape) for value in values))
    if len(shapes) > 1:
        return (
            f"{where} has the shape {shapes[0]}, and that of another item in the batch {shapes[1]}; "
            "resize or crop all to one size"
        )
    if isinstance(values[0], np.ndarray) and values[0].dtype.kind not in "biuf":
        return f"{where} is {describe(values[0])}, which cannot be batched; return numbers"
    return None


def _list_fault(values: Sequence[Any], where: str) -> str | None:
    lengths = list(dict.fromkeys(len(value) for value in values))
    if len(lengths) > 1:
        return f"{where} has {lengths[0]} values, and that of another item {lengths[1]}; return the same number in all"
    faults = (find_fault(parts, f"value {i} of {where}") for i, parts in enumerate(zip(*values, strict=True)))
    return next(filter(None, faults), None)


def describe(value: Any) -> str:
    """Return a short description of a value, such as "a tensor (2, 32, 32, 3) of float32"."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    if isinstance(value, Image.Image):
        return f"a PIL image ({value.mode}, {value.width} × {value.height} pixels)"
    if isinstance(value, list | tuple):
        return f"{_kind(value)} of {len(value)}"
    return _kind(value)


def _kind(value: Any) -> str:
    """Return the kind of a value, which is the same for values that can be batched together."""
    if value is None:
        return "None"
    kinds: dict[str, Any] = {
        "a tensor": Tensor,
        "an array": np.ndarray,
        "a text": str,
        "bytes": bytes,
        "a number": bool | int | float | np.number,
        "a dictionary": Mapping,
        "a tuple": tuple,
        "a list": list,
        "a PIL image": Image.Image,
    }
    return next(
        (kind for kind, types in kinds.items() if isinstance(value, types)), f"an object of type {type(value).__name__}"
    )


def _quoted(key: object) -> str:
    return f'"{key}"' if isinstance(key, str) else f"the key of type {type(key).__name__}"
