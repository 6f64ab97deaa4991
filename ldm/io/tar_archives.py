"""Tar archives from elsewhere: their files, checked one by one, and unpacking that can be continued. Needs no torch."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from ldm.errors import DiskFullError, UserError
from ldm.io.archives import BLOCK, BadArchive
from ldm.io.files import write_error


@contextmanager
def open_tar(path: Path, source: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """Open a tar archive, compressed or not.

    Args:
        path: the archive, for messages if `source` is given.
        source: its content, such as an archive within another one.

    Raises:
        BadArchive: it is not a tar archive, or is damaged. Errors of reading inside the block are covered too.
        UserError: it cannot be read.
    """
    try:
        with _opened(path, source) as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).partition("\n")[0].rstrip(":")  # the other lines name compressions
        raise BadArchive(f'the archive "{path}" is damaged or incomplete ({reason}); get it again') from error


def _opened(path: Path, source: IO[bytes] | None) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:*") if source is None else tarfile.open(fileobj=source, mode="r:")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot read the archive "{path}": {reason}; check the path and its permissions') from None


def files_of(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Iterate over the files in a tar archive.

    Args:
        archive: the archive.
        path: its path, for messages.

    Raises:
        BadArchive: an entry is a link or a device, or leaves the folder; or the archive has been cut.
    """
    for entry in archive:
        name = PurePosixPath(entry.name)
        if name.is_absolute() or ".." in name.parts or "\\" in entry.name or "\0" in entry.name:
            raise BadArchive(f'the archive "{path}" is refused: its entry "{entry.name}" leaves the folder')
        if entry.isdir():
            continue
        if not entry.isreg():
            raise BadArchive(f'the archive "{path}" is refused: its entry "{entry.name}" is a link or a device')
        yield entry
    _check_end(archive, path)


def _check_end(archive: tarfile.TarFile, path: Path) -> None:
    """Raise an error unless an archive that was read to its end has a block of zeros there.

    `tarfile` takes an archive that was cut between two entries, or within a header, for a complete one.

    Raises:
        BadArchive: the block is missing.
    """
    source = archive.fileobj
    if source is not None:
        source.seek(archive.offset)
        if source.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise BadArchive(f'the archive "{path}" is incomplete: it ends after "{_last_name(archive)}"; get it again')


def _last_name(archive: tarfile.TarFile) -> str:
    entries = archive.getmembers()
    return entries[-1].name if entries else "nothing"


def extract(archive: tarfile.TarFile, entry: tarfile.TarInfo, target: Path) -> None:
    """Write a file of an archive to `target`, unless a file of this size is there.

    An interrupted run leaves a shorter file, which the next run replaces.

    Raises:
        BadArchive: the archive ends within the file.
        UserError: the file cannot be written.
        DiskFullError: the disk is full. The incomplete file is deleted.
    """
    try:
        if target.is_file() and target.stat().st_size == entry.size:
            return
        source = archive.extractfile(entry)
        if source is None:
            raise BadArchive(f'the archive is damaged: its entry "{entry.name}" has no content; get it again')
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(source, out, BLOCK)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise write_error(target, error) from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise an error if the disk of `folder` has less than `needed` bytes left.

    Args:
        folder: a folder, which need not exist yet.
        needed: number of bytes.
        what: what needs them, for the message.

    Raises:
        DiskFullError: there is less space.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskFullError(
            f'{what} needs {needed / 1e9:,.1f} GB in "{os.fspath(folder)}", where {free / 1e9:,.1f} GB are free; '
            "free some space or choose another disk"
        )
