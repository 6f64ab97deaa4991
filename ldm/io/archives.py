"""Zip archives from untrusted sources: checked first, then unpacked completely or not at all. Needs no torch."""

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

# Weights hardly compress, so an archive that expands to more than MAX_RATIO times its size is a zip bomb. Archives that
# expand to less than SMALL bytes are harmless.
MAX_RATIO, SMALL = 20, 1 << 20
BLOCK = 1 << 20


class BadArchive(UserError):
    """Error for an archive that is damaged or malicious."""


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive after a check of all its entries.

    Raises:
        BadArchive: the file is not a zip archive or is damaged; or an entry leaves the folder, is a link, is encrypted
            or expands too much. Errors of reading inside the block are covered too.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if fault := _entry_fault(entry):
                    raise BadArchive(f'the archive "{path.name}" is refused: its entry "{entry.filename}" {fault}')
            size = sum(entry.file_size for entry in archive.infolist())
            if size > max(MAX_RATIO * path.stat().st_size, SMALL):
                raise BadArchive(f'the archive "{path.name}" is refused: it would expand to {size:,} bytes')
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise BadArchive(f'"{path.name}" is not a zip archive, or is damaged ({error}); download it again') from error


def _entry_fault(entry: zipfile.ZipInfo) -> str | None:
    """Return what makes an entry of an archive unsafe, or None."""
    name = entry.orig_filename
    if "\\" in name or ":" in name or "\0" in name or name.startswith("/"):
        return "has an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "leaves the folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return "is encrypted" if entry.flag_bits & 1 else None


def _visible_files(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the files in an archive, without hidden ones and those that macOS adds."""
    hidden = ("__MACOSX", ".")
    return [
        entry
        for entry in archive.infolist()
        if not entry.is_dir() and not any(part.startswith(hidden) for part in PurePosixPath(entry.filename).parts)
    ]


def unpack_weights(path: Path, target: Path) -> None:
    """Write the weights in an archive to `target`, and no other file.

    The weights are the file with the name of `target`, or else the only file with its suffix.

    Raises:
        UserError: there is no such file, or several; or `target` cannot be written.
        BadArchive: see `open_archive`.
    """
    with open_archive(path) as archive:
        entries = {PurePosixPath(entry.filename): entry for entry in _visible_files(archive)}
        named = [name for name in entries if name.name == target.name]
        candidates = named or [name for name in entries if name.suffix == target.suffix]
        if len(candidates) != 1:
            listed = ", ".join(map(str, entries)) or "nothing"
            raise UserError(
                f'the archive "{path.name}" does not contain one {target.name}, but {listed}; unpack it by hand'
            )
        with atomic_path(target) as temporary:
            _extract(archive, entries[candidates[0]], temporary)


def unpack_folders(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Unpack the folders `names` of an archive, each to `folder/<name>`.

    They may be nested in the archive. Existing folders stay as they are. If `names` is a single folder that the archive
    lacks, the whole archive is its content.

    Raises:
        UserError: the archive lacks a folder; the others are unpacked. Or `folder` cannot be written.
        BadArchive: see `open_archive`.
    """
    with open_archive(path) as archive:
        found: dict[str, list[tuple[zipfile.ZipInfo, PurePosixPath]]] = {name: [] for name in names}
        for entry in _visible_files(archive):
            parts = PurePosixPath(entry.filename).parts
            depth = next((i for i, part in enumerate(parts[:-1]) if part in found), None)
            if depth is not None:
                found[parts[depth]].append((entry, PurePosixPath(*parts[depth + 1 :])))
        if len(names) == 1 and not found[names[0]]:
            found[names[0]] = [(entry, PurePosixPath(entry.filename)) for entry in _visible_files(archive)]
        for name, entries in found.items():
            if entries and not (folder / name).exists():
                _unpack_folder(archive, entries, folder / name)
    missing = [name for name, entries in found.items() if not entries]
    if missing:
        raise UserError(f'the archive "{path}" does not contain {", ".join(missing)}; it was kept: unpack it by hand')


def _unpack_folder(
    archive: zipfile.ZipFile, entries: Sequence[tuple[zipfile.ZipInfo, PurePosixPath]], target: Path
) -> None:
    with atomic_path(target) as temporary:
        try:
            for entry, relative in entries:
                file = temporary / relative
                file.parent.mkdir(parents=True, exist_ok=True)
                _extract(archive, entry, file)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: str | os.PathLike[str]) -> None:
    """Write one entry to `target`; reading it to its end verifies the checksum."""
    with archive.open(entry) as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, BLOCK)
