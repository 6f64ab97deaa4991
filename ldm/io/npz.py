"""Write NumPy archives row by row, so that an array never has to fit into memory."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

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
