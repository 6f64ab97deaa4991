"""Captions of the images of a folder: text files beside them, a column of a table, or the names of the files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ldm.data.rows import Rows, in_threads
from ldm.data.tables import decode_leniently, is_text

FROM_TEXT_FILE, FROM_NAME = "txt", "name"  # values of `caption` that are not the name of a column
CAPTION_SUFFIX = ".txt"
SEPARATORS = re.compile(r"[\s_\-.+]+")
COUNTER = re.compile(r"\(?\d+\)?")


def add_captions(rows: Rows, source: str) -> None:
    """Add the entry `caption` to rows; rows without a caption are left out.

    Args:
        rows: the images.
        source: "txt", "name", or the name of a column of the table. A list of captions makes several rows.

    Raises:
        UserError: there is no such column, or no image has a caption.
    """
    if source == FROM_TEXT_FILE:
        captions: list[Any] = in_threads(_read_caption, [caption_file(path) for path in rows.paths], "reading captions")
        where, advice = "beside them", f"write each into a {CAPTION_SUFFIX} file with the name of its image"
    elif source == FROM_NAME:
        captions = [words_of(Path(file).stem) for file in rows.files]
        where, advice = "in the names of their files", "choose another source of captions"
    else:
        captions = _one_in_each_row(rows, rows.column(source, "caption"))
        where, advice = f'in the column "{source}"', "fill the column, or name another one"
    texts = [" ".join(str(caption).split()) if _is_caption(caption) else "" for caption in captions]
    rows.entries["caption"] = texts
    undecodable = {i for i, text in enumerate(texts) if text and not is_text(text)}
    rows.leave_out(undecodable, f"have a caption {where} that is not valid UTF-8", "save the captions as UTF-8 text")
    rows.leave_out(
        [i for i, text in enumerate(rows.entries["caption"]) if not text], f"have no caption {where}", advice
    )


def words_of(stem: str) -> str:
    """Return the words of a file name without its suffix and without counters at its end: "red-car_01" → "red car"."""
    words = [word for word in SEPARATORS.split(stem) if word]
    while words and COUNTER.fullmatch(words[-1]):
        words.pop()
    return " ".join(words)


def _is_caption(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value == value  # not for NaN


def _one_in_each_row(rows: Rows, values: list[Any]) -> list[Any]:
    """Return captions after repeating the rows whose value is a list of captions."""
    lists = [value if isinstance(value, list) and value else [value] for value in values]
    if any(len(each) > 1 for each in lists):
        rows.keep(i for i, each in enumerate(lists) for _ in each)
    return [caption for each in lists for caption in each]


def caption_file(image: str | os.PathLike[str]) -> str:
    """Return the path of the text file beside an image."""
    return os.path.splitext(image)[0] + CAPTION_SUFFIX


def _read_caption(path: str) -> str | None:
    try:
        return decode_leniently(Path(path).read_bytes()).replace("\0", " ")
    except OSError:
        return None
