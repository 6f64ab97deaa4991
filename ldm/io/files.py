"""Writing files so that nobody ever meets half of one, and telling them apart."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.errors import UserError


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


def check_writable(folder: Path, option: str) -> None:
    """Find out before any work whether files can go to `folder`, which need not exist yet.

    Raises:
        UserError: they cannot; `option` is what named the folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f'{option} "{folder}": "{existing}" is a file; name a folder')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f'{option} "{folder}" cannot be written to; name another folder')


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it takes the place of `path` when the block succeeds.

    What was in `path` before goes then. When the block fails the temporary folder goes and `path` stays as it was.

    Raises:
        UserError: the folder cannot be made, written to or replaced, or the disk is full.
    """
    target = Path(path).resolve()  # a link stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.rename(replaced)  # a folder that is not empty cannot be overwritten
        temporary.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot write "{path}": {reason}; choose another place to write to') from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
