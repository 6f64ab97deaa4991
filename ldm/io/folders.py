"""List the files of a folder by their suffixes, in the order of their names.

Hidden files and folders, whose names begin with a dot, are not data: macOS and notebooks write `._x.png`, `.DS_Store`
and `.ipynb_checkpoints` beside the files of users.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldm.errors import UserError
from ldm.io.text import printable

logger = logging.getLogger(__name__)

# Files of file managers on Windows, in lower case. They are no data either.
SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db"})
SHOWN = 3  # names that a message lists

# Device and inode, which are equal for all paths of a folder; the path without links where a file system has no inodes.
Identity = tuple[int, int] | str


@dataclass
class Listing:
    """Files of a folder, as sorted paths relative to it with forward slashes.

    Attributes:
        folder: the folder.
        files: the files with one of the suffixes.
        others: all other files except hidden files and system files.
        broken: those of the others that are links to no file, with one of the suffixes.
    """

    folder: Path
    files: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """The files, each with the path of the folder."""
        return [self.folder / name for name in self.files]

    def log_others(self, noun: str) -> None:
        """Log the number of the other files, in one line.

        Args:
            noun: plural name of the listed files, such as "images".
        """
        log_passed_over(self.folder, noun, self.others)


def log_passed_over(folder: Path, noun: str, others: Collection[str]) -> None:
    """Log the number of the files in `folder` that are not `noun`, such as "images"; log nothing if there is none."""
    if others:
        count = "1 file" if len(others) == 1 else f"{len(others)} files"
        logger.info('passed over %s in "%s" besides the %s: %s', count, folder, noun, _shown(others))


def _shown(names: Collection[str]) -> str:
    return ", ".join([*map(printable, sorted(names)[:SHOWN]), *(["…"] if len(names) > SHOWN else [])])


def list_files(folder: str | os.PathLike[str], suffixes: Collection[str]) -> Listing:
    """Return the files in `folder` with one of `suffixes`, which are in lower case.

    Raises:
        UserError: the folder cannot be listed.
    """
    listing = Listing(Path(folder))
    for entry in _entries(os.fspath(folder)):
        if not _is_folder(entry):
            _add(listing, entry, entry.name, suffixes)
    return _sorted(listing)


def list_files_below(folder: str | os.PathLike[str], suffixes: Collection[str]) -> Listing:
    """Return the files in `folder` and below with one of `suffixes`, which are in lower case.

    Symbolic links to folders are followed. Each folder is listed once, even if several links point to it: by its path
    without links if there is one. A link to a folder that contains the link is not followed.

    Raises:
        UserError: the folder cannot be listed.
    """
    walk = _Walk(Listing(Path(folder)), suffixes)
    walk.add_folder(os.fspath(folder), "", _ancestors(folder))
    while walk.links:
        links, walk.links = sorted(walk.links.items()), {}
        for prefix, (path, above) in links:
            walk.add_folder(path, prefix, above | _ancestors(path))
    return _sorted(walk.listing)


class _Walk:
    """Walk through folders that lists each of them once, and collects the links to folders.

    Attributes:
        links: relative path of each link → its path, and the folders that contain it.
    """

    def __init__(self, listing: Listing, suffixes: Collection[str]) -> None:
        self.listing, self.suffixes = listing, suffixes
        self.visited: set[Identity] = set()
        self.links: dict[str, tuple[str, frozenset[Identity]]] = {}

    def add_folder(self, folder: str, prefix: str, above: frozenset[Identity]) -> None:
        """Add the files in `folder` and below; their relative paths begin with `prefix`.

        Args:
            folder: the path of the folder.
            prefix: its path relative to the listing, with a slash at the end unless it is empty.
            above: the folders that contain it.
        """
        waiting = [(folder, prefix, above)]
        while waiting:
            folder, prefix, above = waiting.pop()
            try:
                identity = _identity(folder)
                if identity in self.visited or identity in above:
                    continue
                self.visited.add(identity)
                for entry in _entries(folder):
                    name = f"{prefix}{entry.name}"
                    if not _is_folder(entry):
                        _add(self.listing, entry, name, self.suffixes)
                    elif entry.is_symlink():
                        self.links[f"{name}/"] = entry.path, above | {identity}
                    else:
                        waiting.append((entry.path, f"{name}/", above | {identity}))
            except UserError as error:
                if not prefix:
                    raise
                logger.warning("%s; its files are left out", error)


def visible(paths: Iterable[Path]) -> list[Path]:
    """Return the paths whose files and folders are not hidden, sorted."""
    return sorted(path for path in paths if not path.name.startswith("."))


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Iterate over the visible entries of a folder, in no order.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    yield entry
    except OSError as error:
        raise _unlisted(folder, error) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _add(listing: Listing, entry: os.DirEntry[str], name: str, suffixes: Collection[str]) -> None:
    """Add an entry that is not a folder to the files or to the others."""
    if os.path.splitext(name)[1].lower() in suffixes and _is_file(entry):
        listing.files.append(name)
    elif entry.name.lower() not in SYSTEM_FILES:
        listing.others.append(name)
        if entry.is_symlink() and os.path.splitext(name)[1].lower() in suffixes and not os.path.exists(entry.path):
            listing.broken.append(name)


def _sorted(listing: Listing) -> Listing:
    if listing.broken:  # their content is missing, as in a data set of git-annex or DVC that was not fetched
        count = "1 link" if len(listing.broken) == 1 else f"{len(listing.broken)} links"
        logger.warning('%s in "%s" to files that do not exist: %s', count, listing.folder, _shown(listing.broken))
    listing.files.sort()
    listing.others.sort()
    return listing


def _identity(folder: str | os.PathLike[str]) -> Identity:
    """Return the identity of a folder.

    Raises:
        UserError: the folder is missing, or cannot be reached.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unlisted(folder, error) from None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _ancestors(folder: str | os.PathLike[str]) -> frozenset[Identity]:
    """Return the folders that contain a folder, links in its path resolved."""
    return frozenset(map(_identity, Path(folder).resolve().parents))


def _unlisted(folder: str | os.PathLike[str], error: OSError) -> UserError:
    return UserError(f'cannot list the folder "{folder}": {error.strerror}; check the path and its permissions')
