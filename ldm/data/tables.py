"""Tables that list images with captions and labels: CSV, TSV, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.distribution import install_hint
from ldm.data.unreadable import shown_names
from ldm.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = ("path", "file_name")  # the second name is that of the Hugging Face format "imagefolder"
METADATA_FILES = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))
MAX_CELL = 1 << 24  # characters of a cell in CSV files
END = "\0"  # last line of a CSV text, which a quote that is not closed takes into its cell


@dataclass(frozen=True)
class Table:
    """Table with named columns of equal length.

    Bytes that are not valid UTF-8 are surrogate characters of the texts, so that the names of files stay valid.
    """

    path: Path
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str) -> list[Any]:
        """Return the values of a column.

        Raises:
            UserError: there is no such column.
        """
        if name not in self.columns:
            hint = did_you_mean(name, self.columns)
            names = shown_names(list(self.columns))
            raise UserError(f'the table "{self.path}" has no column "{name}"{hint}; its columns are {names}')
        return self.columns[name]

    def files(self) -> list[Any]:
        """Return the values of the column with the paths of the images.

        Raises:
            UserError: there is no such column.
        """
        return self.column(next((name for name in PATH_COLUMNS if name in self.columns), PATH_COLUMNS[0]))


def is_table(path: str | Path) -> bool:
    """Return whether a file is a table by its suffix."""
    return Path(path).suffix.lower() in TABLE_SUFFIXES


def read_table(path: Path) -> Table:
    """Read a table by its suffix. Damaged rows are left out, and one log line names the first of them.

    Raises:
        UserError: the file is missing, cannot be read, or has no rows.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = Table(path, _read_parquet(path))
        elif suffix == ".jsonl":
            table = Table(path, _read_json_lines(path, _text(path)))
        else:
            table = Table(path, _read_separated(path, _text(path), "\t" if suffix == ".tsv" else None))
    except FileNotFoundError:
        raise UserError(f'there is no table "{path}"; check the path') from None
    except OSError as error:
        raise UserError(f'cannot read the table "{path}": {error.strerror or error}; check the file') from None
    if not len(table):
        raise UserError(f'the table "{path}" has no rows; write one row for each image')
    return table


def is_text(value: Any) -> bool:
    """Return whether a value is a text without bytes that are not valid UTF-8."""
    return isinstance(value, str) and not any("\udc80" <= character <= "\udcff" for character in value)


def decode_leniently(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 with a byte-order mark; bytes that are not valid UTF-8 become surrogate characters."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _text(path: Path) -> str:
    """Return the text of a table.

    Raises:
        UserError: the file is not text.
        OSError: it cannot be read.
    """
    text = decode_leniently(path.read_bytes())
    if "\0" in text:
        raise UserError(f'the table "{path}" is not text: it contains NUL characters; give UTF-8 text')
    return text


def _read_separated(path: Path, text: str, delimiter: str | None) -> dict[str, list[Any]]:
    """Return the columns of a CSV or TSV file; a CSV file may have semicolons as delimiters."""
    first = text.partition("\n")[0]
    delimiter = delimiter or (";" if ";" in first and "," not in first else ",")
    limit = csv.field_size_limit(MAX_CELL)  # of the process; restored below
    reader = csv.reader(io.StringIO(f"{text}\n{END}", newline=""), delimiter=delimiter)
    rows: list[list[str]] = []
    wrong: list[int] = []
    line, is_complete = 1, False
    try:
        header = [name.strip() for name in next(reader, [])]
        if END not in "".join(header):
            line = reader.line_num + 1
        for row in reader:
            is_complete = row == [END]
            if row and row[-1].endswith(END):
                break
            if len(row) == len(header):
                rows.append(row)
            elif any(cell.strip() for cell in row):
                wrong.append(reader.line_num)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f'cannot read the table "{path}": line {reader.line_num}: {error}; check its quotes') from None
    finally:
        csv.field_size_limit(limit)
    if not is_complete:
        raise UserError(f'cannot read the table "{path}": the quote in line {line} is not closed; check its quotes')
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise UserError(f'the table "{path}" has two columns "{twice[0]}"; rename one')
    _log_wrong_lines(path, wrong, f"do not have {len(header)} cells, as the header has", "quote cells with delimiters")
    return {name: [row[i] or None for row in rows] for i, name in enumerate(header)}


def _read_json_lines(path: Path, text: str) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    wrong: list[int] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            wrong.append(number)
    _log_wrong_lines(path, wrong, "are not JSON objects", 'write {"path": …, "caption": …} in each line')
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"Parquet tables need the package pyarrow; install it with {install_hint('datasets')}"
        ) from None
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f'cannot read the table "{path}": {reason}; give a Parquet file') from None
    return {name: _parquet_values(table.column(name)) for name in table.column_names}


def _parquet_values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values: Iterable[bytes | None] = column.cast("binary").to_pylist()
        return [None if value is None else value.decode("utf-8", errors="surrogateescape") for value in values]


def _log_wrong_lines(path: Path, lines: Sequence[int], fault: str, advice: str) -> None:
    if lines:
        numbers = shown_names([str(line) for line in lines])
        logger.warning(
            '%d lines of the table "%s" %s and are left out (line %s); %s', len(lines), path, fault, numbers, advice
        )
