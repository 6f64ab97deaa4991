"""Lists of indices in files: text, NumPy arrays, and pickles, which are read without running code."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from ldm.errors import UserError
from ldm.io.text import read_text

PICKLE_SUFFIXES = (".p", ".pkl", ".pickle")


def read_indices(path: Path) -> np.ndarray:
    """Read a list of indices, (N,) int64.

    Args:
        path: a `.npy` file with a one-dimensional array of integers; a pickle (`.p`, `.pkl`, `.pickle`) of a list,
            tuple or NumPy array of integers; or a text file with integers between spaces, commas or line ends.

    Raises:
        UserError: the file is missing or is not such a list, or an index is negative.
    """
    if not path.is_file():
        raise UserError(f'there is no list of indices "{path}"; check the path')
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            indices = np.load(path, allow_pickle=False)
        elif suffix in PICKLE_SUFFIXES:
            indices = _unpickle(path.read_bytes())
        else:
            indices = _parse(read_text(path, "list of indices"))
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f'cannot read the list of indices "{path}": {error}; give a .npy or .txt file') from None
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise UserError(
            f'"{path}" is not a list of indices: its shape is {indices.shape}, its dtype {indices.dtype}; '
            "give a .npy or .txt file with one index for each item"
        )
    if len(indices) and indices.min() < 0:
        raise UserError(f'"{path}" contains the index {indices.min()}; indices begin at 0')
    return indices.astype(np.int64)


def _parse(text: str) -> np.ndarray:
    words = re.split(r"[\s,]+", text.strip(" \t\n,[]"))
    wrong = next((word for word in words if word and not re.fullmatch(r"[+-]?\d+", word)), None)
    if wrong is not None:
        raise ValueError(f'"{wrong[:40]}" is not an integer')
    return np.array([int(word) for word in words if word], dtype=np.int64)


def _unpickle(data: bytes) -> np.ndarray:
    """Return the integers in a pickle.

    Raises:
        ValueError: the pickle is damaged, or names anything but lists, integers and NumPy arrays of integers.
    """
    try:
        content = _Unpickler(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as error:  # damaged pickles raise many types of errors
        raise ValueError(f"it is not a pickle, or is damaged ({error})") from None
    if isinstance(content, _Array):
        return content.content
    if isinstance(content, list | tuple) and all(type(index) is int for index in content):
        return np.array(content, dtype=np.int64)
    raise ValueError(f"it contains a {type(content).__name__} that is not a list of integers")


class _Dtype:
    """Description of an integer dtype in a pickle."""

    def __init__(self, name: str, *options: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[iu][1248]", name):
            raise ValueError(f"it contains values of the dtype {name!r}, which are not integers")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Array of integers in a pickle."""

    content: np.ndarray

    def __init__(self, *shape: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, data = state
        self.content = np.frombuffer(data, dtype.dtype).reshape(shape)


def _from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.content = np.frombuffer(data, dtype.dtype).reshape(shape)
    return array


def _scalar(dtype: _Dtype, data: bytes) -> int:
    return int(np.frombuffer(data, dtype.dtype)[0])


def _encode(text: str, encoding: str) -> bytes:
    return str(text).encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Unpickler that builds integers and arrays of them with the functions above, and refuses every other name."""

    known: ClassVar[dict[str, Callable[..., Any]]] = {
        "_codecs.encode": _encode,
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
        "numpy.core.multiarray._reconstruct": _Array,
        "numpy._core.multiarray._reconstruct": _Array,
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray.scalar": _scalar,
        "numpy.core.numeric._frombuffer": _from_buffer,
        "numpy._core.numeric._frombuffer": _from_buffer,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name.

        Raises:
            ValueError: the name is none of NumPy's.
        """
        full = f"{module}.{name}"
        return self.known[full] if full in self.known else self._refuse(full)

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to other files.

        Raises:
            ValueError: always.
        """
        self._refuse(f"the reference {pid!r}")

    @staticmethod
    def _refuse(name: str) -> NoReturn:
        raise ValueError(f"the pickle is refused, because it names {name}")
