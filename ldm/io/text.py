"""Read text files of users: UTF-8 with or without a byte-order mark, or UTF-16 with one.

A line ends at a line feed, a carriage return, or both. `str.splitlines` also splits at U+2028, U+0085, a vertical tab
and others, which are characters of a line here.
"""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path

from ldm.errors import UserError

UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})  # categories of Unicode: controls, surrogates, ends of lines


def read_text(path: str | os.PathLike[str], noun: str, advice: str = "give UTF-8 text") -> str:
    """Return the text of a file, with line feeds as the only ends of lines.

    Args:
        path: the file.
        noun: name of its content in error messages, such as "prompt file".
        advice: end of the message about a file that cannot be read.

    Raises:
        UserError: the file is missing, cannot be read, or is not text.
    """
    try:
        return decode(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f'there is no {noun} "{path}"; check the path') from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f'cannot read the {noun} "{path}": {reason}; {advice}') from None


def read_lines(path: str | os.PathLike[str], noun: str, advice: str = "give UTF-8 text") -> list[str]:
    """Return the lines of a text file without their ends; see `read_text`.

    Raises:
        UserError: the file is missing, cannot be read, or is not text.
    """
    lines = read_text(path, noun, advice).split("\n")
    return lines if lines[-1] else lines[:-1]


def decode(data: bytes) -> str:
    """Decode the content of a text file, with line feeds as the only ends of lines.

    Raises:
        ValueError: the bytes are not text; the message names the line.
    """
    encoding, name = "utf-8-sig", "UTF-8"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding, name = "utf-16", "UTF-16"
    try:
        text = _with_line_feeds(data.decode(encoding))
    except UnicodeDecodeError as error:
        before = _with_line_feeds(data[: error.start].decode(encoding, errors="ignore"))
        place = f"line {before.count(chr(10)) + 1} (byte {error.start})"
        raise ValueError(f"{place} is not valid {name}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} contains a NUL character")
    return text


def printable(text: str) -> str:
    """Return text for one line of a message: control characters, ends of lines and invalid bytes as escapes."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in UNPRINTABLE else c for c in text)


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
