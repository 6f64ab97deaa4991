"""Rows of a data set: image files with their captions and labels, from a folder, a list or a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ldm.config.assets import locate
from ldm.data.image_files import ARRAY_SUFFIX, existing_folder
from ldm.data.tables import METADATA_FILES, Table, decode_leniently, is_table, read_table
from ldm.data.unreadable import PROGRESS_AFTER, THREADS, shown_names
from ldm.errors import UserError
from ldm.io.folders import list_files_below, log_passed_over
from ldm.io.image_formats import image_suffixes

logger = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")


class Rows:
    """Image files of a data set, with one value of each entry for every file.

    Args:
        name: name of the data set in messages.
        root: folder that relative paths start from.
        files: paths of the images.
        table: the table that lists the images.
        listed: name of their source in messages.
    """

    def __init__(self, name: str, root: Path, files: Sequence[str], table: Table | None, listed: str) -> None:
        self.name, self.root, self.table, self.listed = name, root, table, listed
        self.files = list(files)
        self.entries: dict[str, list[Any]] = {}
        self.others: set[str] = set()  # files of the folder that are not images
        self._numbers = list(range(len(self.files)))  # of the rows in the table

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> list[Path]:
        """Paths of the images."""
        return [self.root / file for file in self.files]

    def column(self, name: str, use: str) -> list[Any]:
        """Return the values of a column of the table.

        Args:
            name: name of the column.
            use: the parameter that names it, in messages.

        Raises:
            UserError: there is no table, or no such column.
        """
        if self.table is None:
            raise UserError(
                f'{self.name}: {use} names the column "{name}", and there is no table; set files to one, or add '
                f"{METADATA_FILES[0]} to the folder"
            )
        values = self.table.column(name)
        return [values[number] for number in self._numbers]

    def leave_out(self, wrong: Iterable[int], fault: str, advice: str) -> None:
        """Remove rows and log their number and the first of them in one line.

        Args:
            wrong: indices of the rows.
            fault: text that says what is wrong with them, such as "have no caption".
            advice: text that says what to do if no other row exists.

        Raises:
            UserError: no row is left.
        """
        removed = set(wrong)
        if not removed:
            return
        if len(removed) == len(self):
            raise UserError(f"{self.name}: all {len(self)} images {fault}; {advice}")
        names = shown_names([self.files[index] for index in sorted(removed)])
        logger.warning("%s: %d of %d images %s and are left out: %s", self.name, len(removed), len(self), fault, names)
        self.keep(index for index in range(len(self)) if index not in removed)

    def keep(self, indices: Iterable[int]) -> None:
        """Keep only the rows with these indices."""
        kept = list(indices)
        self.files = [self.files[index] for index in kept]
        self._numbers = [self._numbers[index] for index in kept]
        self.entries = {key: [values[index] for index in kept] for key, values in self.entries.items()}

    def log_others(self, used: Iterable[str]) -> None:
        """Log the number of the files of the folder that are neither images nor used."""
        log_passed_over(self.root, "images", self.others.difference(used))

    def remove_duplicates(self) -> None:
        """Remove rows that repeat the file and the entries of an earlier row, and log their number in one line."""
        seen: set[str] = set()
        repeated: list[int] = []
        for index, file in enumerate(self.files):
            key = repr((str(PurePosixPath(file)), *(values[index] for values in self.entries.values())))
            if key in seen:
                repeated.append(index)
            seen.add(key)
        self.leave_out(repeated, "repeat an earlier row", "check the list")


def find_rows(name: str, data_root: str | Path | None, files: str | Path | None, needs_table: bool = False) -> Rows:
    """Return the images of a folder, a list or a table.

    Args:
        name: name of the data set in messages.
        data_root: the folder of the images (default: the folder of `files`).
        files: a text file with one path a line, or a table with a column of paths (default: all images below
            `data_root`).
        needs_table: look for one of `METADATA_FILES` in the folder if `files` is not set.

    Raises:
        UserError: the folder, the list or the table is missing or empty.
    """
    if files is None:
        if data_root is None:
            raise UserError(f"{name} needs data_root, the folder of the images, or files, a list or table of them")
        folder = existing_folder(data_root, name)
        table_file = next((path for path in (folder / file for file in METADATA_FILES) if path.is_file()), None)
        if needs_table and table_file is not None:
            return _rows_of_table(name, folder, table_file)
        listing = list_files_below(folder, {*image_suffixes(), ARRAY_SUFFIX})
        if not listing.files:
            raise UserError(f'{name}: the folder "{data_root}" contains no image; name the folder of the images')
        rows = Rows(name, folder, listing.files, None, str(data_root))
        rows.others = set(listing.others)
        return rows
    file = locate(Path(files).expanduser())
    folder = file.parent if data_root is None else existing_folder(data_root, name)
    if is_table(file):
        return _rows_of_table(name, folder, file)
    return _rows_of_list(name, folder, file)


def _rows_of_list(name: str, folder: Path, file: Path) -> Rows:
    try:
        text = decode_leniently(file.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'{name}: cannot read the list "{file}": {reason}; set files to a list or a table') from None
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    names = [line for line in lines if line]
    if not names or "\0" in text:
        raise UserError(f'{name}: the list "{file}" names no image; write one path a line')
    return Rows(name, folder, names, None, str(file))


def _rows_of_table(name: str, folder: Path, file: Path) -> Rows:
    table = read_table(file)
    files = table.files()
    missing = {i for i, path in enumerate(files) if not isinstance(path, str) or not path.strip()}
    names = [f"row {i + 1}" if i in missing else path for i, path in enumerate(files)]
    rows = Rows(name, folder, names, table, str(file))
    rows.leave_out(
        missing,
        "have no path in the table",
        "fill the column of paths",
    )
    return rows


def in_threads(function: Callable[[In], Out], values: Sequence[In], title: str, block: int = 200) -> list[Out]:
    """Return the results of a function that waits for files, for each value in order, with a progress bar.

    Args:
        function: the function.
        values: its arguments.
        title: label of the progress bar.
        block: values that a thread takes at once.
    """
    from tqdm import tqdm

    with (
        ThreadPoolExecutor(THREADS) as pool,
        tqdm(total=len(values), desc=title, unit="file", delay=PROGRESS_AFTER, leave=False) as progress,
    ):
        results: list[Out] = []
        starts = range(0, len(values), block)
        for part in pool.map(lambda start: [function(value) for value in values[start : start + block]], starts):
            results += part
            progress.update(len(part))
    return results
