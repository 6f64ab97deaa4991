"""NumPy's archives, written entry by entry: what they hold need never be in memory as a whole."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ldm.io.files import atomic_path


@dataclass(frozen=True)
class Rows:
    """An array that is made row by row: `shape[0]` rows of shape `shape[1:]`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Iterable[np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Rows:
        """An array that is in memory."""
        return cls(array.shape, array.dtype, array)


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, Rows]) -> None:
    """Write an archive that `numpy.load` opens, whole or not at all; uncompressed, as `numpy.savez`.

    Raises:
        UserError: the place cannot be written to.
        ValueError: the rows of an array are of another shape or number than it says.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A fixed date: the same arrays give the same file.
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
