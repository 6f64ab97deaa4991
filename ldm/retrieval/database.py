"""Databases of CLIP embeddings of picture patches, read from NPZ files.

Legend: N vectors of D numbers each; D is 768 for CLIP ViT-L/14.
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

# What each array of a file holds for one vector, beside the N of its shape.
ROW_SHAPES: dict[str, tuple[int | None, ...]] = {"embedding": (None,), "img_id": (), "patch_coords": (4,)}
# Rows that are worked on at a time: 50 MB in float32, whatever the size of the database.
CHUNK_ROWS = 16_384

_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile, and numpy's reader of headers, raise for files that are not what they should be.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError, KeyError),
    *(ValueError, TypeError, SyntaxError, TokenError),
)


@dataclass(frozen=True)
class Header:
    """What a file says about one of its arrays."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Database:
    """Embeddings, and where they come from.

    Args:
        folder: where the files are.
        embeddings: (N, D), float16, float32 or float64 as stored; of any length.
    """

    folder: Path
    embeddings: np.ndarray

    def __len__(self) -> int:
        return len(self.embeddings)


def read_database(folder: Path) -> Database:
    """The database in a folder of NPZ files with the arrays `embedding`, `img_id` and `patch_coords`.

    The files follow one another in the order of their names. Only embeddings are read, and needed; of the other arrays
    the headers are. Memory holds the database and, where there are several files, the largest of them once more.

    Raises:
        UserError: a file is damaged, an array has another shape than it must, or memory does not suffice.
    """
    files = sorted(path for path in folder.glob("*.npz") if path.is_file())
    if not files:
        raise UserError(f'the database "{folder}" holds no NPZ files; put files with an array "embedding" there')
    headers = [_checked_headers(path)["embedding"] for path in files]
    widths = [header.shape[1] for header in headers]
    for path, width in zip(files, widths, strict=True):
        if width != widths[0]:
            raise UserError(f'"{path}" holds vectors of {width} numbers, "{files[0]}" of {widths[0]}; keep one kind')
    count = sum(header.shape[0] for header in headers)
    dtype = np.result_type(*(header.dtype for header in headers)).newbyteorder("=")
    size = count * widths[0]
    with out_of_memory_told(folder, size * dtype.itemsize), _reading_bar(folder, headers) as bar:
        if len(files) == 1:
            return Database(folder, _read(files[0], bar).astype(dtype, copy=False))
        embeddings = np.empty((count, widths[0]), dtype)
        start = 0
        for path, header in zip(files, headers, strict=True):
            embeddings[start : start + header.shape[0]] = _read(path, bar)
            start += header.shape[0]
    return Database(folder, embeddings)


def normalised(rows: np.ndarray, device: torch.device | str = "cpu", first: int = 0) -> torch.Tensor:
    """Rows (n, D) as float32 of length 1 on a device; rows of zeros stay.

    Args:
        rows: any floating-point numbers.
        device: where to.
        first: the number of the first row in its database, for the message.

    Raises:
        UserError: a row has no length, because a number in it is infinite or NaN.
    """
    unit = F.normalize(torch.from_numpy(rows).to(device).float(), dim=-1)
    if not torch.isfinite(unit.sum()):
        row = first + int((~unit.isfinite().all(dim=-1)).nonzero()[0])
        raise UserError(f"the database is damaged: vector {row} holds numbers that are not finite; download it again")
    return unit


def chunks(embeddings: np.ndarray, rows: int = CHUNK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
    """Embeddings (N, D) in pieces of at most `rows`, each with the number of its first row."""
    for first in range(0, len(embeddings), rows):
        yield first, embeddings[first : first + rows]


@contextmanager
def out_of_memory_told(folder: Path, size: int) -> Iterator[None]:
    """Turn a lack of memory inside into a message that names the database and how many bytes it needs."""
    try:
        yield
    except MemoryError:
        raise UserError(f'the database "{folder}" needs {size / 1e9:.1f} GB of memory; use a smaller one') from None


def _reading_bar(folder: Path, headers: Sequence[Header]) -> tqdm:
    total = sum(int(np.prod(header.shape)) * header.dtype.itemsize for header in headers)
    # Small databases are read before anyone looks.
    return tqdm(total=total, desc=f"reading {folder.name}", unit="B", unit_scale=True, delay=1.0, leave=False)


def _checked_headers(path: Path) -> dict[str, Header]:
    """The headers of the arrays that a file holds, of those that `ROW_SHAPES` knows; no array is read."""
    with _damage_told(path), zipfile.ZipFile(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        headers = {name: _header(archive, name) for name in ROW_SHAPES if name in held}
    if "embedding" not in headers:
        listed = ", ".join(shown(name) for name in held[:4]) or "nothing"
        raise UserError(f'"{path}" has no array "embedding"{did_you_mean("embedding", held)}; it holds {listed}')
    for name, header in headers.items():
        wanted = ROW_SHAPES[name]
        fits = len(header.shape) == 1 + len(wanted) and all(
            want in (None, size) for want, size in zip(wanted, header.shape[1:], strict=True)
        )
        if not fits or 0 in header.shape[1:]:
            shape = "(" + ", ".join(["N", *("D" if size is None else str(size) for size in wanted)]) + ")"
            raise UserError(f'"{path}": the array "{name}" must have the shape {shape}, not {header.shape}')
        if header.shape[0] != headers["embedding"].shape[0]:
            lengths = f"{headers['embedding'].shape[0]} vectors but {header.shape[0]} entries"
            raise UserError(f'"{path}" is damaged: it has {lengths} in "{name}"; download it again')
    if headers["embedding"].shape[0] == 0:
        raise UserError(f'"{path}" holds no vectors; remove it')
    dtype = headers["embedding"].dtype
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise UserError(f'"{path}": the array "embedding" must hold floating-point numbers, not {_kind(dtype)}')
    return headers


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    """Raises: ValueError where the array is not as long as it says, among others."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADER_READERS:
            raise ValueError(f'"{name}" is of an unknown version')
        shape, _, dtype = _HEADER_READERS[version](file)
        start = file.tell()
    if min(shape, default=0) < 0:
        raise ValueError(f'"{name}" has the shape {shape}')
    # An array of objects is a pickle, whose length says nothing.
    if not dtype.hasobject and start + int(np.prod(shape, dtype=object)) * dtype.itemsize != info.file_size:
        raise ValueError(f'"{name}" is not as long as its shape {shape} says')
    return Header(shape, dtype)


def _read(path: Path, bar: tqdm) -> np.ndarray:
    """The embeddings of a file, whose headers have been checked."""
    with _damage_told(path), zipfile.ZipFile(path) as archive, archive.open("embedding.npy") as file:
        return np.lib.format.read_array(CallbackIOWrapper(bar.update, file, "read"), allow_pickle=False)


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f'cannot read the database file "{path}" ({reason}); download it again') from None


def _kind(dtype: np.dtype) -> str:
    return "Python objects" if dtype.hasobject else str(dtype)
