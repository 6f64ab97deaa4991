"""Read and write NumPy archives row by row, so that an array never has to fit into memory."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np

from ldm.errors import UserError
from ldm.io.files import atomic_path


@dataclass(frozen=True)
class Rows:
    """Array given as an iterator: `shape[0]` rows of shape `shape[1:]`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Iterable[np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Rows:
        """Return the rows of an array in memory."""
        return cls(array.shape, array.dtype, array)


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Rows]) -> None:
    """Write an uncompressed archive for `numpy.load`, completely or not at all.

    Raises:
        UserError: the file cannot be written.
        ValueError: the number of rows, or the shape or dtype of a row, differs from what an array states.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # ZipInfo has a fixed date, so equal arrays produce equal files.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                descr = np.lib.format.dtype_to_descr(array.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                count = 0
                for row in array.rows:
                    if row.shape != array.shape[1:] or row.dtype != array.dtype:
                        raise ValueError(f"row {count} of {name} is {row.dtype} {row.shape}")
                    member.write(row.tobytes())
                    count += 1
                if count != array.shape[0]:
                    raise ValueError(f"{name} has {count} rows, not {array.shape[0]}")


@contextmanager
def _archive(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Open an archive, and convert the errors of damaged ones.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f'there is no archive "{path}"; check the path') from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f'cannot read the archive "{path}": {reason}; it is damaged or not an NPZ file') from None


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of an array in an archive; return its shape and dtype.

    Raises:
        ValueError: the member is not an array of numbers in the order of C.
    """
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("it contains Python objects")
    if is_fortran and len(shape) > 1:
        raise ValueError("an array is stored in the order of Fortran")
    return shape, dtype


def array_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the shape and dtype of each array in an archive, by name; only headers are read.

    Raises:
        UserError: the file is missing or damaged, or contains other things than arrays of numbers.
    """
    found = {}
    with _archive(path) as archive:
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    found[name.removesuffix(".npy")] = _read_header(member)
    return found


def read_rows(path: str | os.PathLike[str], name: str) -> Iterator[np.ndarray]:
    """Yield the rows of an array in an archive, one after the other.

    Raises:
        UserError: the file is missing, damaged or truncated, or has no such array.
    """
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f'it has no array "{name}"')
        with archive.open(f"{name}.npy") as member:
            shape, dtype = _read_header(member)
            size = dtype.itemsize * int(np.prod(shape[1:]))
            for row in range(shape[0]):
                content = member.read(size)
                if len(content) != size:
                    raise ValueError(f"{name} ends after {row} of {shape[0]} rows")
                yield np.frombuffer(content, dtype).reshape(shape[1:])


def read_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Return an array of an archive; see `read_rows`.

    Raises:
        UserError: the file is missing, damaged or truncated, or has no such array.
    """
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f'it has no array "{name}"')
        with archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)
