"""Entries of a batch that a model reads: texts, integers, maps, images and masks, and the checks of their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.training.collate import describe

# Largest absolute value of an image in [-1, 1] after resampling with overshoot, and of one that is surely in [0, 255].
OVERSHOOT, SURELY_PIXELS = 1.5, 16.0


@dataclass(frozen=True)
class Entry:
    """Entry of a batch with any value.

    Attributes:
        key: its key.
        role: what the model needs it for, in messages.
    """

    key: str
    role: str

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong with the value and how to convert it, or None."""
        return None

    def first_batch_fault(self, value: Any) -> str | None:
        """Return such text about values that are expensive to read, or None."""
        return None

    def warning(self, value: Any) -> str | None:
        """Return text about values that are probably wrong, or None."""
        return None


@dataclass(frozen=True)
class Tensors(Entry):
    """Tensor of any shape."""

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        if isinstance(value, Tensor):
            return None
        return f"is {describe(_example(value))} in an item; return an array of numbers"


@dataclass(frozen=True)
class Texts(Entry):
    """One text for each item.

    Attributes:
        or_tokens: a tensor of tokens is fine as well.
    """

    or_tokens: bool = False

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        if isinstance(value, Tensor) and self.or_tokens:
            return None
        if not isinstance(value, list | tuple):
            return f"is {describe(value)}; return one text for each item"
        wrong = next((text for text in value if not isinstance(text, str)), "")
        if wrong is None:
            return 'is None in an item; return a text, e.g. ""'
        if isinstance(wrong, list | tuple):
            return "is a list in each item; return one text, e.g. random.choice(captions)"
        return None if isinstance(wrong, str) else f"is {describe(wrong)} in an item; return a text"


@dataclass(frozen=True)
class Integers(Entry):
    """Integers from 0 to `count` - 1.

    Attributes:
        count: number of different integers; None if it is not known.
        source: parameter of the model that sets `count`.
    """

    count: int | None
    source: str

    def _type_fault(self, value: Any, dims: int, form: str) -> str | None:
        if not isinstance(value, Tensor):
            return f"is {describe(_example(value))} in an item; return {form}"
        if value.dim() != dims:
            return f"has the shape {tuple(value.shape)} in a batch; return {form} for each item"
        if value.is_floating_point() or value.dtype == torch.bool:
            return f"is {describe(value)}; return {form}, e.g. of dtype int64"
        return None

    def _range_fault(self, value: Tensor) -> str | None:
        if self.count is None or value.device.type != "cpu" or value.numel() == 0:
            return None
        low, high = _bounds(value)
        if low >= 0 and high < self.count:
            return None
        wrong = high if low >= 0 else low
        return (
            f"has the value {wrong:.0f}; {self.source} of the model is {self.count}, which allows 0 to {self.count - 1}"
        )


@dataclass(frozen=True)
class Labels(Integers):
    """Class labels (B,).

    Attributes:
        reserved: label that no item may have, because it stands for the empty conditioning; None if there is none.
    """

    reserved: int | None = None

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        fault = self._type_fault(value, 1, "the number of the class, an integer") or self._range_fault(value)
        if fault or self.reserved is None or value.device.type != "cpu" or not (value == self.reserved).any():
            return fault
        return (
            f"has the value {self.reserved}, which cond_dropout uses for the null class; "
            f"set {self.source} to {self.reserved + 2}"
        )


@dataclass(frozen=True)
class Tokens(Integers):
    """Rows of tokens (B, L).

    Attributes:
        length: largest L; None if any length is allowed.
    """

    length: int | None = None

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        fault = self._type_fault(value, 2, "a row of integers")
        if fault is None and self.length is not None and value.shape[1] > self.length:
            fault = f"has {value.shape[1]} tokens; max_seq_len of the model allows {self.length}"
        return fault or self._range_fault(value)


@dataclass(frozen=True)
class ClassMaps(Integers):
    """Maps of class indices (B, H, W) or (B, H, W, 1), or with one channel for each class (B, H, W, `count`)."""

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        if not isinstance(value, Tensor):
            return f"is {describe(_example(value))} in an item; return an array of class indices (H, W)"
        if value.dim() == 4 and value.shape[3] == self.count:
            return None
        if value.dim() == 3 or (value.dim() == 4 and value.shape[3] == 1):
            return self._range_fault(value)
        return f"has the shape {tuple(value.shape)} in a batch; return class indices (H, W), or (H, W, {self.count})"


@dataclass(frozen=True)
class Maps(Entry):
    """Maps (B, H, W, C), or (B, H, W) for one channel.

    Attributes:
        channels: C; None if it is not known.
    """

    channels: int | None

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        if not isinstance(value, Tensor):
            return f"is {describe(_example(value))} in an item; return an array (H, W, {self._channel_count()})"
        shape = tuple(value.shape)
        if len(shape) not in (3, 4):
            return f"has the shape {shape} in a batch; return an array (H, W, {self._channel_count()}) for each item"
        if self.channels is None or self.channels == (shape[3] if len(shape) == 4 else 1):
            return None
        if shape[1] == self.channels:
            return f"has the shape {shape} in a batch, channels first; return (H, W, C), e.g. np.moveaxis(image, 0, -1)"
        hint = ', e.g. with image.convert("RGB")' if self.channels == 3 else ""
        return f"has the shape {shape} in a batch; return an array (H, W, {self.channels}){hint}"

    def _channel_count(self) -> str:
        return "C" if self.channels is None else str(self.channels)

    def _float_fault(self, value: Tensor, remedy: str) -> str | None:
        if value.is_floating_point():
            return None
        return f"is {describe(value)}; return float32, {remedy}"


@dataclass(frozen=True)
class Images(Maps):
    """Images (B, H, W, C) in [-1, 1]."""

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        return super().fault(value) or self._float_fault(value, "in [-1, 1], e.g. image.astype(np.float32) / 127.5 - 1")

    def first_batch_fault(self, value: Tensor) -> str | None:
        """Return text if the values are surely in [0, 255]."""
        low, high = _float_bounds(value)
        if low >= 0 and high > SURELY_PIXELS:
            return f"has values from {low:g} to {high:g}; return values in [-1, 1], e.g. image / 127.5 - 1"
        return None

    def warning(self, value: Tensor) -> str | None:
        """Return text if the values are probably not in [-1, 1]."""
        low, high = _float_bounds(value)
        if 0 <= low < high <= 1:
            return f"has values from {low:g} to {high:g}, not in [-1, 1]; if 0 means black, return 2 * image - 1"
        if max(-low, high) > OVERSHOOT:
            return f"has values from {low:g} to {high:g}, not in [-1, 1]; check the normalization"
        return None


@dataclass(frozen=True)
class Masks(Maps):
    """Masks (B, H, W, 1), 1 in the masked part and -1 elsewhere."""

    def fault(self, value: Any) -> str | None:
        """Return text that says what is wrong, or None."""
        return super().fault(value) or self._float_fault(value, "1 in the masked part and -1 elsewhere")

    def first_batch_fault(self, value: Tensor) -> str | None:
        """Return text if the values are those of another kind of mask."""
        low, high = _float_bounds(value)
        if low == 0 or max(-low, high) > OVERSHOOT:
            return f"has values from {low:g} to {high:g}; return 1 in the masked part and -1 elsewhere"
        return None


def _bounds(value: Tensor) -> tuple[float, float]:
    value = value if value.is_floating_point() else value.to(torch.int64)  # unsigned types have no `aminmax`
    low, high = value.aminmax()
    return float(low), float(high)


def _float_bounds(value: Tensor) -> tuple[float, float]:
    """Return the smallest and largest value; -1 and 1 if the values are on another device or are not finite."""
    if value.device.type != "cpu" or value.numel() == 0:
        return -1.0, 1.0
    low, high = _bounds(value)
    return (low, high) if high - low < float("inf") else (-1.0, 1.0)  # not for NaN


def _example(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value
