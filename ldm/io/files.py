"""Write files and folders atomically, and compute their hashes."""

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
    """Yield a temporary path beside `path`; the file written there replaces `path` when the block succeeds.

    Missing parent folders are created. When the block fails, the temporary file is deleted and `path` is unchanged.

    Raises:
        UserError: the folder cannot be created or written to, or the disk is full.
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
    """Raise an error if files cannot be written to `folder`, which need not exist yet.

    Args:
        folder: the folder.
        option: the option that named it, for the message.

    Raises:
        UserError: part of the path is a file, or the folder is not writable.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f'{option} "{folder}": "{existing}" is a file; name a folder')
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f'{option} "{folder}" cannot be written to; name another folder')


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it replaces `path` and its content when the block succeeds.

    When the block fails, the temporary folder is deleted and `path` is unchanged.

    Raises:
        UserError: the folder cannot be created, written to or replaced, or the disk is full.
    """
    target = Path(path).resolve()  # a symbolic link is kept
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
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
