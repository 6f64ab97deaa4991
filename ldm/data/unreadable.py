"""Image files that cannot be read: found before training, and replaced by other images during training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ldm.errors import UserError
from ldm.io.images import has_readable_header
from ldm.io.text import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = 5  # names that a message lists
THREADS = 16  # more than cores, because files on a network drive wait for their answers
BLOCK = 500  # files that a thread checks in one go
PROGRESS_AFTER = 3.0  # seconds
MOST_IN_A_ROW = 100  # failures to read; as many mean that a drive is gone, not that files are damaged
LARGE = 50_000_000  # pixels of a PNG that is decoded to be sure that it is not too large
HEAD, TAIL = 24, 64  # bytes


class SharedFlags:
    """Flags that all processes of a loader share, so that each event is logged once.

    It has no `__dict__`, because the fingerprint of a data set must not depend on what was read.

    Args:
        count: number of flags.
    """

    __slots__ = ("_flags",)

    def __init__(self, count: int) -> None:
        self._flags = torch.zeros(count, dtype=torch.uint8)
        try:
            self._flags.share_memory_()
        except RuntimeError:  # no shared memory; each process has its own flags
            logger.debug("no shared memory for the flags of a data set")

    def __contains__(self, index: int) -> bool:
        return bool(self._flags[index])

    def __len__(self) -> int:
        """Return the number of flags that are set."""
        return int(self._flags.sum())

    def set(self, index: int) -> bool:
        """Set a flag, and return whether it was not set before."""
        is_new = not self._flags[index]
        self._flags[index] = 1
        return is_new


class UnreadableFiles(SharedFlags):
    """Record of the files of a data set that cannot be read.

    Args:
        count: number of files.
    """

    __slots__ = ("_reported", "is_checked")

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._reported = 0
        self.is_checked = False

    def add(self, index: int, reason: str) -> None:
        """Record a file, and log the reason unless the file was recorded before."""
        if self.set(index):
            logger.warning("%s; another image takes its place", reason)

    def add_checked(self, indices: Iterable[int]) -> None:
        """Record the files that a check of all files found and logged."""
        for index in indices:
            self.set(index)
        self._reported = len(self)
        self.is_checked = True

    def replace(self, index: int, read: Callable[[int], T], name: str) -> tuple[int, T]:
        """Read item `index`, or the next one that can be read, and return its index and its content.

        Args:
            index: index of the item.
            read: function that reads an item and raises a `UserError` if it cannot be read.
            name: name of the data set in messages.

        Raises:
            UserError: no item can be read, or `MOST_IN_A_ROW` ones in a row cannot.
        """
        count, failures, last = len(self._flags), 0, ""
        for candidate in ((index + step) % count for step in range(count)):
            if candidate in self:
                continue
            try:
                return candidate, read(candidate)
            except UserError as error:
                failures, last = failures + 1, str(error)
                self.add(candidate, last)
            if failures == MOST_IN_A_ROW:
                raise UserError(f"{name}: {failures} images in a row cannot be read; check the drive ({last})")
        raise UserError(f"{name}: no image can be read" + (f" ({last})" if last else "; check the files"))

    def report(self, name: str) -> None:
        """Log the number of files that could not be read, if it has changed.

        Args:
            name: name of the data set, such as "data.params.train".
        """
        if len(self) != self._reported:
            self._reported = len(self)
            logger.warning(
                "%s: %d of %d images could not be read; others took their place", name, len(self), len(self._flags)
            )


def find_faults(paths: Sequence[Path], read: Callable[[Path], Any]) -> dict[int, str]:
    """Return the reasons for the files that cannot be read, by their indices.

    Most files are recognised by their first and last bytes. Files that these do not tell to be complete are read.

    Args:
        paths: the files.
        read: function that reads a file and raises a `UserError` if it cannot be read.
    """
    from tqdm import tqdm

    def check(start: int) -> list[tuple[int, str | None]]:
        block = paths[start : start + BLOCK]
        return [(start + i, _fault(path, read)) for i, path in enumerate(block)]

    faults: dict[int, str] = {}
    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(paths), desc="checking images", unit="file", delay=PROGRESS_AFTER, leave=False) as progress,
    ):
        for block in pool.map(check, range(0, len(paths), BLOCK)):
            faults.update({index: fault for index, fault in block if fault is not None})
            progress.update(len(block))
    return faults


def check_limit(max_unreadable: Any, where: str) -> None:
    """Check the largest share of unreadable files.

    Args:
        max_unreadable: the share, or None.
        where: name of the data set in messages.

    Raises:
        UserError: it is not a number from 0 to 1.
    """
    if max_unreadable is not None and not (isinstance(max_unreadable, int | float) and 0 <= max_unreadable <= 1):
        raise UserError(f"{where}: max_unreadable is a share from 0 to 1, such as 0.01, or null, not {max_unreadable}")


def check_share(faults: Mapping[int, str], names: Sequence[str], max_unreadable: float, where: str) -> None:
    """Log the files that cannot be read, in one line.

    Args:
        faults: the reason for each such file, by its index in `names`.
        names: all files.
        max_unreadable: largest share of such files.
        where: name of the data set in messages.

    Raises:
        UserError: the share is larger.
    """
    if not faults:
        return
    found = f"{where}: {len(faults)} of {len(names)} images cannot be read"
    shown = shown_names([names[index] for index in sorted(faults)])
    if len(faults) > max_unreadable * len(names):
        raise UserError(
            f"{found} ({shown}), more than max_unreadable ({max_unreadable:g}) allows; remove or replace them, or "
            f"raise max_unreadable; the first: {faults[min(faults)]}"
        )
    logger.warning("%s and are left out: %s", found, shown)


def shown_names(names: Sequence[str]) -> str:
    """Return the first names as text, with an ellipsis if there are more."""
    shown = [printable(name) for name in names[:SHOWN]]
    return ", ".join([*shown, *(["…"] if len(names) > SHOWN else [])])


def wrapped(dataset: Any) -> Iterator[Any]:
    """Iterate over a data set and the data sets that it wraps."""
    waiting, seen = [dataset], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        parts = getattr(current, "__dict__", {})
        waiting += [parts[key] for key in ("dataset", "images", "data") if hasattr(parts.get(key), "__getitem__")]
        waiting += [*parts["datasets"]] if isinstance(parts.get("datasets"), list | tuple) else []


def report_unreadable(dataset: Any, name: str) -> None:
    """Log the number of files that could not be read, for a data set and those that it wraps, if it has changed.

    Args:
        dataset: the data set.
        name: its name, such as "data.params.train".
    """
    for each in wrapped(dataset):
        files = getattr(each, "unreadable", None)
        if isinstance(files, UnreadableFiles):
            files.report(name)


def _fault(path: Path, read: Callable[[Path], Any]) -> str | None:
    """Return the reason why a file cannot be read, or None."""
    try:
        if _is_complete(path):
            return None
    except OSError:
        pass  # `read` says why
    try:
        read(path)
    except UserError as error:
        return str(error)
    return None


def _is_complete(path: Path) -> bool:
    """Return whether an image file begins and ends as its format says; False if that is not certain.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEAD)
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - TAIL))
        tail = file.read(TAIL)
    if head.startswith(b"\xff\xd8\xff"):  # JPEG ends with the marker EOI
        return b"\xff\xd9" in tail and size > HEAD
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
        return b"IEND\xaeB`\x82" in tail and head[12:16] == b"IHDR" and 0 < width * height < LARGE
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith((b"GIF87a", b"GIF89a")):
        return tail.rstrip(b"\0").endswith(b";")
    if head.startswith(b"\x93NUMPY"):
        return _is_complete_array(path)
    return has_readable_header(path)


def _is_complete_array(path: Path) -> bool:
    """Return whether a file of NumPy holds the whole array that its header describes."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return True
