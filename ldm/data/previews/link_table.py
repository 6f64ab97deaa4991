"""Tables of captions and addresses, as Conceptual Captions publishes them, beside the downloaded images."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from ldm.config.assets import locate
from ldm.data.rows import Rows, find_rows
from ldm.data.tables import decode_leniently, is_text
from ldm.data.unreadable import shown_names
from ldm.errors import UserError

logger = logging.getLogger(__name__)

# Names of the published tables: Train_GCC-training.tsv and Validation_GCC-1.1.0-Validation.tsv.
PATTERN = "*GCC*.tsv"
HEADER = ("caption", "url")
STEM = re.compile(r"(\d+)(?:_(\d+))?")  # the index of a line, and the CRC-32 of its address


def find_link_table(folder: Path) -> Path | None:
    """Return the table of links in a folder, or None.

    Raises:
        UserError: there are several.
    """
    tables = sorted(folder.glob(PATTERN))
    if len(tables) > 1:
        raise UserError(
            f'"{folder}" contains several tables of links: {shown_names([t.name for t in tables])}; set captions'
        )
    return tables[0] if tables else None


def rows_of_links(name: str, root: Path, table: Path) -> Rows:
    """Return the images below a folder with the captions of a table.

    Args:
        name: name of the data set in messages.
        root: the folder of the images.
        table: a file with a caption, a tab and an address in each line. The first line may be a header.

    Raises:
        UserError: the table cannot be read, or no image belongs to one of its lines.
    """
    captions, addresses = read_links(table, name)
    rows = find_rows(name, root, None)
    numbers = [_line_of(file, addresses) for file in rows.files]
    rows.entries["number"] = numbers
    foreign = [i for i, number in enumerate(numbers) if number is None]
    rows.leave_out(foreign, f'belong to no line of "{table}"', "name each by the index of its line, such as 17.jpg")
    used = rows.entries.pop("number")
    rows.entries["caption"] = [captions[number] for number in used]
    without = [i for i, caption in enumerate(rows.entries["caption"]) if not is_text(caption) or not caption]
    rows.leave_out(without, "have no caption, or one that is not valid UTF-8", "correct the table")
    absent = len(captions) - len(set(used))
    if absent:
        logger.info('%s: %d of %d lines of "%s" have no image', name, absent, len(captions), table)
    return rows


def read_links(table: Path, name: str) -> tuple[list[str], list[str]]:
    """Return the captions and the addresses of a table; lines without a tab have an empty caption.

    Raises:
        UserError: the table cannot be read, or no line has a tab.
    """
    try:
        text = decode_leniently(locate(table).read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f'{name}: cannot read the table "{table}": {reason}; set captions to a table of links'
        ) from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if tuple(lines[0].split("\t")) == HEADER:
        del lines[0]
    pairs = [line.split("\t") if line.count("\t") == 1 else ["", ""] for line in lines]
    wrong = [str(i) for i, pair in enumerate(pairs) if not pair[0]]
    if len(wrong) == len(pairs):
        raise UserError(
            f'{name}: no line of "{table}" is a caption, a tab and an address; set captions to such a table'
        )
    if wrong:
        logger.warning('%s: %d lines of "%s" are no pairs: %s', name, len(wrong), table, shown_names(wrong))
    return [" ".join(caption.split()) for caption, _ in pairs], [address for _, address in pairs]


def _line_of(file: str, addresses: Sequence[str]) -> int | None:
    """Return the index of the line to which an image belongs, or None."""
    match = STEM.fullmatch(Path(file).stem)
    if match is None or len(match[1]) > 12 or int(match[1]) >= len(addresses):
        return None
    number = int(match[1])
    checksum = zlib.crc32(addresses[number].encode("utf-8", "surrogateescape"))
    return number if match[2] is None or int(match[2]) == checksum else None
