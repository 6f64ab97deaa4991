"""Databases of CLIP embeddings of image patches, read from NPZ files.

Shapes: N vectors of width D; D is 768 for CLIP ViT-L/14.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from ldm.config.targets import shown
from ldm.errors import UserError, did_you_mean
from ldm.io.folders import list_files

# Shape of each array in a file, without N; None stands for D.
ROW_SHAPES: dict[str, tuple[int | None, ...]] = {"embedding": (None,), "img_id": (), "patch_coords": (4,)}
# Number of rows to process at a time: 50 MB in float32.
CHUNK_ROWS = 16_384

_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# Exceptions of zipfile and of NumPy's header reader for damaged files.
_READ_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError, KeyError),
    *(ValueError, TypeError, SyntaxError, TokenError),
)


@dataclass(frozen=True)
class Header:
    """Header of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Database:
    """Embeddings of a database.

    Args:
        folder: the folder of the files.
        embeddings: (N, D) float16, float32 or float64, as stored and not normalised.
    """

    folder: Path
    embeddings: np.ndarray

    def __len__(self) -> int:
        return len(self.embeddings)


def read_database(folder: Path) -> Database:
    """Read the database in a folder of NPZ files with the arrays `embedding`, `img_id` and `patch_coords`.

    Files are concatenated in the order of their names. Only the embeddings are read and required; of the other arrays,
    only the headers are checked. Several files need memory for the database and once more for the largest file.

    Raises:
        UserError: a file is damaged, an array has the wrong shape, or there is not enough memory.
    """
    listing = list_files(folder, (".npz",))
    files = listing.paths
    if not files:
        raise UserError(f'the database "{folder}" contains no NPZ files; add files with an array "embedding"')
    listing.log_others("NPZ files")
    headers = [_checked_headers(path)["embedding"] for path in files]
    widths = [header.shape[1] for header in headers]
    for path, width in zip(files, widths, strict=True):
        if width != widths[0]:
            raise UserError(f'"{path}" has vectors of width {width}, "{files[0]}" of {widths[0]}; remove one of them')
    count = sum(header.shape[0] for header in headers)
    dtype = np.result_type(*(header.dtype for header in headers)).newbyteorder("=")
    size = count * widths[0]
    with report_out_of_memory(folder, size * dtype.itemsize), _progress_bar(folder, headers) as bar:
        if len(files) == 1:
            return Database(folder, _read(files[0], bar).astype(dtype, copy=False))
        embeddings = np.empty((count, widths[0]), dtype)
        start = 0
        for path, header in zip(files, headers, strict=True):
            embeddings[start : start + header.shape[0]] = _read(path, bar)
            start += header.shape[0]
    return Database(folder, embeddings)


def normalise(rows: np.ndarray, device: torch.device | str = "cpu", first: int = 0) -> torch.Tensor:
    """Normalise rows (n, D) to unit length in float32 on a device; rows of zeros remain zeros.

    Args:
        rows: an array with a floating-point dtype.
        device: device of the result.
        first: index of the first row in the database, for the error message.

    Raises:
        UserError: a row is not finite.
    """
    unit = F.normalize(torch.from_numpy(rows).to(device).float(), dim=-1)
    if not torch.isfinite(unit.sum()):
        row = first + int((~unit.isfinite().all(dim=-1)).nonzero()[0])
        raise UserError(f"the database is damaged: vector {row} is not finite; download the database again")
    return unit


def chunks(embeddings: np.ndarray, rows: int = CHUNK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
    """Iterate over embeddings (N, D) in chunks of at most `rows`, each with the index of its first row."""
    for first in range(0, len(embeddings), rows):
        yield first, embeddings[first : first + rows]


@contextmanager
def report_out_of_memory(folder: Path, size: int) -> Iterator[None]:
    """Convert a MemoryError into a UserError that names the database and the bytes that it needs."""
    try:
        yield
    except MemoryError:
        raise UserError(f'the database "{folder}" needs {size / 1e9:.1f} GB of memory; use a smaller one') from None


def _progress_bar(folder: Path, headers: Sequence[Header]) -> tqdm:
    total = sum(int(np.prod(header.shape)) * header.dtype.itemsize for header in headers)
    # The delay hides the bar for small databases.
    return tqdm(total=total, desc=f"reading {folder.name}", unit="B", unit_scale=True, delay=1.0, leave=False)


def _checked_headers(path: Path) -> dict[str, Header]:
    """Read and check the headers of the arrays in a file that `ROW_SHAPES` lists, without reading the arrays."""
    with _report_damage(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        headers = {name: _read_header(archive, name) for name in ROW_SHAPES if name in names}
    if "embedding" not in headers:
        listed = ", ".join(shown(name) for name in names[:4]) or "nothing"
        raise UserError(f'"{path}" has no array "embedding"{did_you_mean("embedding", names)}; it contains {listed}')
    for name, header in headers.items():
        row_shape = ROW_SHAPES[name]
        fits = len(header.shape) == 1 + len(row_shape) and all(
            expected in (None, size) for expected, size in zip(row_shape, header.shape[1:], strict=True)
        )
        if not fits or 0 in header.shape[1:]:
            shape = "(" + ", ".join(["N", *("D" if size is None else str(size) for size in row_shape)]) + ")"
            raise UserError(f'"{path}": the array "{name}" must have the shape {shape}, not {header.shape}')
        if header.shape[0] != headers["embedding"].shape[0]:
            lengths = f"{headers['embedding'].shape[0]} vectors but {header.shape[0]} entries"
            raise UserError(f'"{path}" is damaged: it has {lengths} in "{name}"; download it again')
    if headers["embedding"].shape[0] == 0:
        raise UserError(f'"{path}" contains no vectors; remove it')
    dtype = headers["embedding"].dtype
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise UserError(f'"{path}": the array "embedding" must have a floating-point dtype, not {_dtype_name(dtype)}')
    return headers


def _read_header(archive: zipfile.ZipFile, name: str) -> Header:
    """Read the header of an array.

    Raises:
        ValueError: the header is invalid, or the length of the array differs from its shape.
    """
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADER_READERS:
            raise ValueError(f'"{name}" has an unknown version')
        shape, _, dtype = _HEADER_READERS[version](file)
        start = file.tell()
    if min(shape, default=0) < 0:
        raise ValueError(f'"{name}" has the shape {shape}')
    # An array of objects is a pickle of any length.
    if not dtype.hasobject and start + int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size:
        raise ValueError(f'the length of "{name}" differs from its shape {shape}')
    return Header(shape, dtype)


def _read(path: Path, bar: tqdm) -> np.ndarray:
    """Read the embeddings of a file with checked headers."""
    with _report_damage(path), zipfile.ZipFile(path) as archive, archive.open("embedding.npy") as file:
        return np.lib.format.read_array(CallbackIOWrapper(bar.update, file, "read"), allow_pickle=False)


@contextmanager
def _report_damage(path: Path) -> Iterator[None]:
    """Convert the exceptions of a damaged file into a UserError that names it."""
    try:
        yield
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f'cannot read the database file "{path}" ({reason}); download it again') from None


def _dtype_name(dtype: np.dtype) -> str:
    return "Python objects" if dtype.hasobject else str(dtype)
