"""Read tar archives from untrusted sources member by member, past damaged ones. Needs no torch.

`tarfile` takes a damaged header for the end of the archive and remembers all members. Training reads shards of
gigabytes once, from files or connections, and must know what it could not read.
"""

from __future__ import annotations

import bz2
import gzip
import http.client
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

BLOCK = 512  # the unit of an archive
READ_SIZE = 1 << 20  # bytes that are skipped at once
MAX_MEMBER = 1 << 28  # bytes; a larger member is skipped
MAX_EXTENSION = 1 << 20  # bytes of a long name
END = bytes(BLOCK)

FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# Types whose header is followed by data that is not a file's content.
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)

# First bytes of compressed archives, and the classes that decompress them.
COMPRESSIONS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    b"BZh": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    b"\xfd7zXZ": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),  # noqa: SIM115 # closed with its shard
}


# Errors of files and connections that end early or cannot be decompressed.
READ_ERRORS = (OSError, EOFError, http.client.HTTPException, zlib.error, lzma.LZMAError)


class BadTar(Exception):
    """Error for a file that is not a tar archive, or whose rest cannot be read."""


@dataclass
class TarMember:
    """Regular file in an archive.

    Attributes:
        name: its path in the archive; bytes that are not UTF-8 are replaced.
        size: bytes of its content.
        offset: position of its content in the archive.
    """

    name: str
    size: int
    offset: int
    _file: BinaryIO
    _is_read: bool = False

    def read(self) -> bytes:
        """Return the content; only possible before the iteration goes on.

        Raises:
            BadTar: the archive ends within the content, or the member is too large.
        """
        if self.size > MAX_MEMBER:
            raise BadTar(f"has {self.size:,} bytes, more than {MAX_MEMBER:,}")
        self._is_read = True
        try:
            content = _read(self._file, self.size)
        except READ_ERRORS as error:
            raise BadTar(_reason(error)) from error
        if len(content) < self.size:
            raise BadTar("is cut short")
        return content


def open_tar(file: BinaryIO) -> BinaryIO:
    """Return the file of an archive, decompressed if it is compressed with gzip, bzip2 or xz."""
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(io.RawIOBase, file), READ_SIZE)
    start = buffered.peek(8)
    for magic, decompress in COMPRESSIONS.items():
        if start.startswith(magic):
            return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, decompress(cast(BinaryIO, buffered)))))
    return cast(BinaryIO, buffered)


def iterate_tar(file: BinaryIO, report: Callable[[str], None]) -> Iterator[TarMember]:
    """Iterate over the regular files of an archive. The content of those that are not read is skipped.

    Args:
        file: the archive, as `open_tar` returns it.
        report: called with a reason for each damaged part; the iteration goes on at the next intact header.

    Raises:
        BadTar: the file is not an archive, or its rest cannot be read.
    """
    try:
        yield from _Reader(file, report).members()
    except READ_ERRORS as error:
        raise BadTar(_reason(error)) from error


class _Reader:
    def __init__(self, file: BinaryIO, report: Callable[[str], None]) -> None:
        self._file, self._report = file, report
        self._can_seek = file.seekable() and isinstance(getattr(file, "raw", None), io.FileIO)
        self._position = 0

    def members(self) -> Iterator[TarMember]:
        long_name: str | None = None
        while (header := self._next_header()) is not None:
            kind, size = header.type, header.size
            padded = -(-size // BLOCK) * BLOCK
            if kind in EXTENSIONS:
                name = self._extension_name(header, padded)
                long_name = name if name is not None and kind != tarfile.XGLTYPE else long_name
                continue
            if kind in FILE_TYPES:
                member = TarMember(long_name or header.name, size, self._position, self._file)
                yield member
                self._position += size if member._is_read else 0
                self._skip(padded - size if member._is_read else padded)
            elif kind not in WITHOUT_DATA:
                self._skip(padded)
            long_name = None

    def _next_header(self) -> tarfile.TarInfo | None:
        """Return the next intact header, or None at the end of the archive."""
        is_damaged, empty = False, 0
        while True:
            start = self._position
            block = _read(self._file, BLOCK)
            self._position += len(block)
            if len(block) < BLOCK:
                if start == 0:
                    raise BadTar("is not a tar archive")
                if block.strip(b"\0"):
                    self._report("is cut short")
                return None
            if block == END:
                empty += 1
                if empty == 2 and not is_damaged:
                    return None
                continue
            empty = 0
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            except tarfile.TarError:
                if start == 0:
                    raise BadTar("is not a tar archive") from None
                if not is_damaged:
                    self._report(f"has a damaged header at byte {start:,}")
                is_damaged = True
                continue
            if header.size >= 0:
                return header

    def _extension_name(self, header: tarfile.TarInfo, padded: int) -> str | None:
        """Return the name in an extended header, if it holds one for the next member."""
        if header.size > MAX_EXTENSION:
            self._skip(padded)
            return None
        data = _read(self._file, padded)[: header.size]
        self._position += padded
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return data.rstrip(b"\0").decode("utf-8", "replace")
        found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data)
        return found[1].decode("utf-8", "replace") if found else None

    def _skip(self, count: int) -> None:
        self._position += count
        if self._can_seek:
            self._file.seek(count, io.SEEK_CUR)
            return
        while count > 0:
            skipped = len(self._file.read(min(count, READ_SIZE)))
            if not skipped:
                return
            count -= skipped


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def _read(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, or those up to the end of the file."""
    content = file.read(min(size, READ_SIZE))
    if len(content) == size or not content:
        return content
    parts = [content]
    while size > (count := sum(map(len, parts))):
        content = file.read(min(size - count, READ_SIZE))
        if not content:
            break
        parts.append(content)
    return b"".join(parts)
