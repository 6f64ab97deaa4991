"""Writing files so that nobody ever meets half of one, and telling them apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.util import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` when the block succeeds.

    Missing parent folders are made. When the block fails the temporary file goes and `path` stays as it was.

    Raises:
        UserError: the folder cannot be made or written to, or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot write "{target}": {reason}; choose another place to write to') from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
