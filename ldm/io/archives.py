"""Zip archives from elsewhere: read in full suspicion, unpacked whole or not at all. Needs no torch."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ldm.errors import UserError
from ldm.io.files import atomic_path

# Weights hardly shrink, so an archive that claims to hold more times its own size is a bomb. The bytes are for the
# little archives of tests and texts.
LARGEST_RATIO, SMALL = 20, 1 << 20
BLOCK = 1 << 20


class BadArchive(UserError):
    """The archive is damaged, or built to do harm; it is of no use."""


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, once every entry in it was found harmless.

    Raises:
        BadArchive: it is no zip archive, is damaged, or has an entry that leaves its folder, is a link, is encrypted
            or grows beyond measure; this covers what is read from it inside the block.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if fault := _fault(entry):
                    raise BadArchive(f'the archive "{path.name}" is refused: its entry "{entry.filename}" {fault}')
            size = sum(entry.file_size for entry in archive.infolist())
            if size > max(LARGEST_RATIO * path.stat().st_size, SMALL):
                raise BadArchive(f'the archive "{path.name}" is refused: it would grow to {size:,} bytes')
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BadArchive(f'"{path.name}" is a damaged archive, or none ({error}); fetch it again') from error


def _fault(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with an entry of an archive."""
    name = entry.orig_filename
    if "\\" in name or ":" in name or "\0" in name or name.startswith("/"):
        return "has a path of its own"
    if ".." in PurePosixPath(name).parts:
        return "leaves the folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return "is encrypted" if entry.flag_bits & 1 else None


def _files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive without what file managers add."""
    hidden = ("__MACOSX", ".")
    return [
        entry
        for entry in archive.infolist()
        if not entry.is_dir() and not any(part.startswith(hidden) for part in PurePosixPath(entry.filename).parts)
    ]


def unpack_weights(path: Path, target: Path) -> None:
    """Write the weights in an archive to `target`, and nothing else of it.

    They are the file of the same name, or else the only one with the same suffix.

    Raises:
        UserError: there are none, or several; `target` cannot be written.
        BadArchive: see `opened`.
    """
    with opened(path) as archive:
        entries = {PurePosixPath(entry.filename): entry for entry in _files(archive)}
        named = [name for name in entries if name.name == target.name]
        chosen = named or [name for name in entries if name.suffix == target.suffix]
        if len(chosen) != 1:
            held = ", ".join(map(str, entries)) or "nothing"
            raise UserError(f'the archive "{path.name}" does not hold one {target.name}, but {held}; unpack it by hand')
        with atomic_path(target) as temporary:
            _write(archive, entries[chosen[0]], temporary)


def unpack_folders(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Unpack those folders in an archive that are called as in `names`, each to `folder/<name>`.

    They may lie deeper in the archive. Folders that are there already stay as they are. An archive without any of
    them, of which one alone is wanted, is that folder.

    Raises:
        UserError: the archive lacks one; the others are unpacked. Or `folder` cannot be written.
        BadArchive: see `opened`.
    """
    with opened(path) as archive:
        found: dict[str, list[tuple[zipfile.ZipInfo, PurePosixPath]]] = {name: [] for name in names}
        for entry in _files(archive):
            parts = PurePosixPath(entry.filename).parts
            at = next((i for i, part in enumerate(parts[:-1]) if part in found), None)
            if at is not None:
                found[parts[at]].append((entry, PurePosixPath(*parts[at + 1 :])))
        if len(names) == 1 and not found[names[0]]:
            found[names[0]] = [(entry, PurePosixPath(entry.filename)) for entry in _files(archive)]
        for name, entries in found.items():
            if entries and not (folder / name).exists():
                _unpack_folder(archive, entries, folder / name)
    missing = [name for name, entries in found.items() if not entries]
    if missing:
        raise UserError(f'the archive "{path}" holds no {", ".join(missing)}; it stays there, look into it by hand')


def _unpack_folder(
    archive: zipfile.ZipFile, entries: Sequence[tuple[zipfile.ZipInfo, PurePosixPath]], target: Path
) -> None:
    with atomic_path(target) as temporary:
        try:
            for entry, relative in entries:
                place = temporary / relative
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(archive, entry, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, place: str | os.PathLike[str]) -> None:
    """Unpack one file; reading to its end compares the checksum."""
    with archive.open(entry) as source, open(place, "wb") as out:
        shutil.copyfileobj(source, out, BLOCK)
