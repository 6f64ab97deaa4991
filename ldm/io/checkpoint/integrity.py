"""Hash inside a checkpoint of `torch.save`, by which damage is found before the file is used.

The hash is the comment of the zip archive, which all programs that read such archives ignore.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ldm.errors import UserError

PREFIX = b"sha256:"
COMMENT_SIZE = len(PREFIX) + 64  # bytes of the comment: the hash is hexadecimal
_END, _END_SIZE = b"PK\x05\x06", 22  # the last record of an archive without a comment
_BLOCK = 1 << 20


def append_hash(path: Path) -> None:
    """Append the hash of a file of `torch.save` to it; a file of another format is left as it is."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(-min(_END_SIZE, size), os.SEEK_END)
        end = file.read()
        if not (end.startswith(_END) and end.endswith(b"\0\0")):
            return
        digest = _hash(path, size)
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", COMMENT_SIZE) + PREFIX + digest.hexdigest().encode())


def check_intact(path: Path) -> None:
    """Check the hash of a checkpoint, or the checksums of its archive if it has no hash.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    try:
        stated = _stated_hash(path)
        is_intact = _has_intact_records(path) if stated is None else stated == _actual_hash(path)
    except OSError as error:
        raise UserError(f'cannot read "{path}": {error.strerror or error}') from error
    if not is_intact:
        raise UserError(f'"{path}" is damaged: its content differs from its checksum')


def _stated_hash(path: Path) -> bytes | None:
    """Return the hash that a checkpoint states, or None."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < _END_SIZE + COMMENT_SIZE:
            return None
        file.seek(-COMMENT_SIZE - _END_SIZE, os.SEEK_END)
        tail = file.read()
    end, comment = tail[:_END_SIZE], tail[_END_SIZE:]
    return comment.removeprefix(PREFIX) if end.startswith(_END) and comment.startswith(PREFIX) else None


def _actual_hash(path: Path) -> bytes:
    """Return the hash of the file as it was before `append_hash`."""
    digest = _hash(path, path.stat().st_size - COMMENT_SIZE - 2)
    digest.update(b"\0\0")
    return digest.hexdigest().encode()


def _hash(path: Path, size: int) -> Any:
    """Return the hash of the first `size` bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(_BLOCK, size))):
            digest.update(block)
            size -= len(block)
    return digest


def _has_intact_records(path: Path) -> bool:
    """Return whether the checksums in an archive are right; other formats have none and count as intact."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return path.stat().st_size > 0
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError):
        return False
