"""Separate the pixels of image files from their metadata.

Pillow refuses a whole file if it refuses its metadata: text of more than 1 MB, a damaged colour profile, or EXIF data
that is not TIFF. The metadata of PNG and JPEG files therefore never reaches its decoders.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
MAX_TEXT = 16 << 20  # bytes of a decompressed text; a longer one is left out
MAX_FILE = 4 << 30  # bytes; no image within Pillow's limit of pixels is as large
# Keys of the texts and entries of `PIL.Image.Image.info` that state the orientation.
EXIF, XMP = "exif", "XML:com.adobe.xmp"
ORIENTATION_TEXTS = (EXIF, "Raw profile type exif", XMP)

Info = dict[str, str | bytes]


def without_metadata(
    path: str | os.PathLike[str], data: bytes | None = None
) -> tuple[str | os.PathLike[str] | BytesIO, Info]:
    """Return the image in a file without its metadata, and the metadata that states its orientation.

    A file of another format than PNG and JPEG is returned as its path: Pillow tolerates its metadata.

    Args:
        path: the file.
        data: its content, if it has been read already; it is returned as a stream instead of the path.

    Raises:
        OSError: the file cannot be read.
    """
    if data is not None:
        if data.startswith(PNG_SIGNATURE):
            return _png_without_metadata(data)
        return _jpeg_without_metadata(data) if data.startswith(JPEG_SIGNATURE) else (BytesIO(data), {})
    with open(path, "rb") as file:
        signature = file.read(len(PNG_SIGNATURE))
        if os.fstat(file.fileno()).st_size > MAX_FILE:
            return path, {}
        if signature == PNG_SIGNATURE:
            return _png_without_metadata(signature + file.read())
        if signature.startswith(JPEG_SIGNATURE):
            return _jpeg_without_metadata(signature + file.read())
    return path, {}


def avif_without_exif(path: str | os.PathLike[str], data: bytes | None = None) -> BytesIO | None:
    """Return an AVIF file without its EXIF data, which its decoder refuses if it is damaged; None for another file.

    The orientation of an AVIF file is not in its EXIF data.

    Args:
        path: the file.
        data: its content, if it has been read already.
    """
    if data is None:
        with open(path, "rb") as file:
            data = file.read(12)
            if data[4:8] != b"ftyp" or os.fstat(file.fileno()).st_size > MAX_FILE:
                return None
            data += file.read()
    elif data[4:8] != b"ftyp":
        return None
    # The entry of an item: its name, version, flags, number (2 or 4 bytes), protection (2 bytes) and type.
    stripped = re.sub(rb"(infe.{8}|infe.{10})Exif", rb"\1free", data, flags=re.DOTALL)
    return None if stripped == data else BytesIO(stripped)


def read_png_texts(path: str | os.PathLike[str], keys: Collection[str]) -> dict[str, str]:
    """Return the texts in a PNG file that have one of `keys`; a file of another format has none.

    Raises:
        OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    return _texts(data, keys) if data.startswith(PNG_SIGNATURE) else {}


def _png_without_metadata(data: bytes) -> tuple[BytesIO, Info]:
    view = memoryview(data)
    parts = [view[start:end] for kind, start, end in _chunks(data) if kind in PIXEL_CHUNKS]
    texts = _texts(data, ORIENTATION_TEXTS)
    info: Info = {**texts}
    if EXIF in texts:
        info[EXIF] = texts[EXIF].encode("latin-1", errors="replace")
    for kind, start, end in _chunks(data):
        if kind == b"eXIf":
            info[EXIF] = b"Exif\0\0" + data[start + 8 : end - 4]
    return BytesIO(b"".join([PNG_SIGNATURE, *parts])), info


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Iterate over the chunks of a PNG file: the kind of each, and its position in `data`.

    A chunk consists of the length of its content (4 bytes), its kind (4), its content and a checksum (4).
    """
    start, kind = len(PNG_SIGNATURE), b""
    while start + 8 <= len(data) and kind != b"IEND":
        kind = data[start + 4 : start + 8]
        if not re.fullmatch(rb"\w{4}", kind):
            return
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield kind, start, end
        start = end


def _texts(data: bytes, keys: Collection[str]) -> dict[str, str]:
    """Return the last text of each of `keys` in a PNG file, except damaged and too long ones.

    Other texts are not decompressed, so their number and their length do not matter.
    """
    last: dict[str, tuple[bytes, bytes]] = {}
    for kind, start, end in _chunks(data):
        if kind in TEXT_CHUNKS:
            content = data[start + 8 : end - 4]
            key = content[:80].partition(b"\0")[0].decode("latin-1")  # a key has at most 79 bytes
            if key in keys:
                last[key] = kind, content[len(key) + 1 :]
    texts = {key: _text(kind, content) for key, (kind, content) in last.items()}
    return {key: text for key, text in texts.items() if text is not None}


def _text(kind: bytes, content: bytes) -> str | None:
    """Return the text of a PNG chunk from its content after the key; None if it is damaged or too long."""
    try:
        if kind == b"tEXt":
            return content.decode("latin-1")
        if kind == b"zTXt":
            return _decompress(content[1:]).decode("latin-1")
        is_compressed = content[0]
        _, _, text = content[2:].split(b"\0", 2)  # the language, and the key in this language
        return (_decompress(text) if is_compressed else text).decode()
    except (ValueError, IndexError, zlib.error):
        return None


def _decompress(data: bytes) -> bytes:
    """Decompress a text.

    Raises:
        ValueError: it is longer than `MAX_TEXT`.
        zlib.error: it is damaged.
    """
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(data, MAX_TEXT)
    if decompressor.unconsumed_tail:
        raise ValueError("the text is too long")
    return text


def _jpeg_without_metadata(data: bytes) -> tuple[BytesIO, Info]:
    parts: list[memoryview | bytes] = [data[:2]]
    info: Info = {}
    position = 2
    while (position := data.find(b"\xff", position)) >= 0:  # bytes between two segments are skipped, as in libjpeg
        marker, length = data[position + 1 : position + 2], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == b"\xff":  # padding
            position += 1
            continue
        if not b"\xc0" <= marker <= b"\xfe" or b"\xd0" <= marker <= b"\xda" or length < 2:
            break  # the pixels begin here, or the file is damaged
        segment = memoryview(data)[position : position + 2 + length]
        if not _is_metadata(marker):
            parts.append(segment)
        elif marker == b"\xe1":
            _add_jpeg_info(info, bytes(segment[4:]))
        position += 2 + length
    parts.append(memoryview(data)[position:] if position >= 0 else b"")
    return BytesIO(b"".join(parts)), info


def _add_jpeg_info(info: Info, content: bytes) -> None:
    """Add the EXIF data or the XMP text in a JPEG segment; EXIF data may continue in further segments."""
    earlier = info.get(EXIF)
    if content.startswith(b"Exif\0\0"):
        info[EXIF] = earlier + content[6:] if isinstance(earlier, bytes) else content
    elif content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        info["xmp"] = content.split(b"\0", 1)[1]


def _is_metadata(marker: bytes) -> bool:
    """Return whether a JPEG segment is a comment or application data, except the segments of JFIF and Adobe.

    JFIF and Adobe state the colour space of the pixels.
    """
    return marker == b"\xfe" or (b"\xe1" <= marker <= b"\xef" and marker != b"\xee")
