"""Tests of `ldm.io.image_metadata`, and of reading images whose metadata is damaged or large."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from images_on_disk import pixels
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from ldm.data.image_files import read_pixels
from ldm.errors import UserError
from ldm.io import image_metadata
from ldm.io.image_metadata import PNG_SIGNATURE, read_png_texts, without_metadata
from ldm.io.images import load_image, open_image
from ldm.io.label_maps import read_label_map
from ldm.io.pixels import to_uint8

LONG = b"a workflow " * (1 << 18)  # 2.9 MB; Pillow refuses compressed texts of more than 1 MB
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def with_chunks(png: bytes, *chunks: bytes, at_end: bool = False) -> bytes:
    """Return a PNG file with chunks after its header, or before its end."""
    place = len(png) - 12 if at_end else len(PNG_SIGNATURE) + 25
    return png[:place] + b"".join(chunks) + png[place:]


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """Return a JPEG file with segments before all others."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def encoded(kind: str, array: np.ndarray, **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int = 6, damage: str | None = None) -> bytes:
    """Return EXIF data with an orientation, and optionally a tag with the wrong type or an invalid header."""
    entries = [struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)]
    if damage == "mistyped tag":
        entries.append(struct.pack(">HHI4s", 0x011A, 2, 4, b"72!\0"))  # the resolution as a text, not as a fraction
    if damage == "orientation as text":
        entries = [struct.pack(">HHI4s", 0x0112, 2, 4, b"six\0")]
    header = b"no TIFF!" if damage == "header" else b"MM\0*\0\0\0\x08"
    return header + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)


PNG_FLAWS = {
    "long zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
    "long iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
    "long iCCP": chunk(b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
    "iCCP of another method": chunk(b"iCCP", b"profile\0\7data"),
    "iCCP of one byte": chunk(b"iCCP", b"p"),
    "zTXt of another method": chunk(b"zTXt", b"workflow\0\7data"),
    "texts of 70 MB": 24 * chunk(b"tEXt", b"workflow\0" + LONG),
    "eXIf that is no TIFF": chunk(b"eXIf", exif(damage="header")),
    "eXIf of no bytes": chunk(b"eXIf", b""),
    "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
    "short gAMA": chunk(b"gAMA", b"1"),
    "wrong animation": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", bytes(3)),
    "Raw profile that is no hexadecimal": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n\n\nxyz")),
}


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("flaw", PNG_FLAWS)
def test_pixels_of_a_png_do_not_depend_on_its_metadata(tmp_path, recwarn, flaw, at_end):
    array = pixels()
    (tmp_path / "x.png").write_bytes(with_chunks(encoded("PNG", array), PNG_FLAWS[flaw], at_end=at_end))
    assert (np.asarray(open_image(tmp_path / "x.png")) == array).all()
    assert (to_uint8(load_image(tmp_path / "x.png"))[0] == array).all()
    assert (read_pixels(tmp_path / "x.png") == array).all()
    labels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    (tmp_path / "y.png").write_bytes(with_chunks(encoded("PNG", labels), PNG_FLAWS[flaw], at_end=at_end))
    assert (read_label_map(tmp_path / "y.png") == labels).all()
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("damage", [None, "mistyped tag"])
def test_orientation_is_applied_beside_a_mistyped_tag(tmp_path, recwarn, kind, damage):
    array = np.kron(np.array([[0, 1, 2], [3, 4, 5]], np.uint8) * 40, np.ones((8, 8), np.uint8))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(kind, array, exif=b"Exif\0\0" + exif(damage=damage), **options)
    (tmp_path / "x").write_bytes(data)
    expected = np.rot90(np.asarray(Image.open(BytesIO(data)).convert("RGB")), -1)
    assert expected.shape == (24, 16, 3) and (np.asarray(open_image(tmp_path / "x")) == expected).all()
    assert not recwarn.list


FLAWED_FILES = {
    "JPEG, EXIF without a header": lambda array: with_segments(
        encoded("JPEG", array), segment(0xE1, b"Exif\0\0" + exif(damage="header"))
    ),
    "JPEG, orientation as text": lambda array: encoded(
        "JPEG", array, exif=b"Exif\0\0" + exif(damage="orientation as text")
    ),
    "JPEG, short colour profile": lambda array: with_segments(
        encoded("JPEG", array), segment(0xE2, b"ICC_PROFILE\0"), segment(0xE2, b"ICC_PROFILE\0\1")
    ),
    "JPEG, damaged index of images": lambda array: with_segments(encoded("JPEG", array), segment(0xE2, b"MPF\0MM")),
    "JPEG, damaged Photoshop data": lambda array: with_segments(
        encoded("JPEG", array), segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\1x")
    ),
    "JPEG, bytes between segments": lambda array: with_segments(encoded("JPEG", array), segment(0xED, b"x"), b"junk"),
    "JPEG, padding": lambda array: with_segments(encoded("JPEG", array), b"\xff\xff", segment(0xED, b"x"), b"\xff"),
    "WebP, EXIF without a header": lambda array: encoded("WEBP", array, exif=exif(damage="header")),
    "WebP, damaged colour profile": lambda array: encoded("WEBP", array, icc_profile=b"?"),
}


@pytest.mark.parametrize("flaw", FLAWED_FILES)
def test_pixels_of_jpeg_and_webp_do_not_depend_on_their_metadata(tmp_path, recwarn, flaw):
    array = pixels()
    (tmp_path / "x").write_bytes(FLAWED_FILES[flaw](array))
    expected = Image.open(BytesIO(encoded(flaw.split(",")[0], array)))
    assert (np.asarray(open_image(tmp_path / "x")) == np.asarray(expected)).all()
    assert not recwarn.list


@pytest.mark.skipif("avif" not in features.get_supported_modules(), reason="this Pillow does not read AVIF")
def test_pixels_of_avif_do_not_depend_on_its_exif_data(tmp_path):
    tags = Image.Exif()
    tags.update({0x0112: 6, 0x010F: "maker"})
    data = encoded("AVIF", pixels(), exif=tags)
    (tmp_path / "good.avif").write_bytes(data)
    (tmp_path / "damaged.avif").write_bytes(re.sub(rb"(Exif\0\0)(MM|II)", rb"\1??", data))
    assert (tmp_path / "damaged.avif").read_bytes() != data
    good, damaged = (np.asarray(open_image(tmp_path / f"{name}.avif")) for name in ("good", "damaged"))
    assert good.shape == (36, 24, 3) and (good == damaged).all()
    (tmp_path / "short.avif").write_bytes(data[:-100])
    with pytest.raises(UserError, match="cannot read the image"):
        open_image(tmp_path / "short.avif")


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"eXIf", exif())],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)],
        [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 40\n" + exif().hex().encode()))],
        [chunk(b"tEXt", b"exif\0" + exif())],
        [chunk(b"eXIf", exif(1)), chunk(b"eXIf", exif())],
    ],
    ids=["eXIf", "XMP", "raw profile", "tEXt", "two"],
)
@pytest.mark.parametrize("at_end", [False, True])
def test_every_orientation_of_a_png_is_applied(tmp_path, chunks, at_end):
    array = pixels()
    (tmp_path / "x.png").write_bytes(with_chunks(encoded("PNG", array), *chunks, at_end=at_end))
    assert (np.asarray(open_image(tmp_path / "x.png")) == np.rot90(array, -1)).all()


def test_a_long_exif_continues_in_the_next_segment_of_a_jpeg(tmp_path):
    array, data = pixels(), exif()
    segments = (segment(0xE1, b"Exif\0\0" + part) for part in (data[:20], data[20:]))
    (tmp_path / "x.jpg").write_bytes(with_segments(encoded("JPEG", array), *segments))
    assert open_image(tmp_path / "x.jpg").size == (24, 36)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_and_empty_files_raise_user_error(tmp_path, kind):
    data = encoded(kind, pixels(96, 144))
    for length in (0, 1, 5, 9, 20, 60, len(data) // 2, len(data) - 40):
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(UserError, match=r'cannot read the image ".*/x": ') as raised:
            open_image(tmp_path / "x")
        assert "\n" not in str(raised.value) and "BytesIO" not in str(raised.value)


def test_files_of_other_formats_and_very_large_ones_are_read_in_place(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(encoded("BMP", pixels()))
    assert without_metadata(path) == (path, {})
    path.write_bytes(encoded("PNG", pixels()))
    monkeypatch.setattr(image_metadata, "MAX_FILE", 100)
    assert without_metadata(path) == (path, {})


# -- texts of PNG files ----------------------------------------------------------------------------------------


def write_texts(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text, zip=key.startswith("z"))
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    return path


def test_texts_are_those_of_pillow(tmp_path):
    texts = {"latin": "grüße", "unicode": "🚀\nline", "zlatin": "grüße", "zunicode": "🚀", "empty": ""}
    path = write_texts(tmp_path / "x.png", **texts)
    with Image.open(path) as file:
        assert read_png_texts(path, texts) == texts == file.text
    assert read_png_texts(path, ["unicode", "other"]) == {"unicode": texts["unicode"]}


def test_texts_that_are_damaged_or_too_long_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(image_metadata, "MAX_TEXT", 100)
    path = write_texts(tmp_path / "x.png", a="fox", z="x" * 100, zlong="x" * 101)
    path.write_bytes(
        with_chunks(path.read_bytes(), chunk(b"tEXt", b"no text"), chunk(b"iTXt", b"b\0"), chunk(b"zTXt", b"c\0\0????"))
    )
    expected = {"a": "fox", "z": "x" * 100, "no text": ""}
    assert read_png_texts(path, ["a", "z", "zlong", "no text", "b", "c"]) == expected


def test_other_files_have_no_texts(tmp_path):
    (tmp_path / "x").write_bytes(b"hello")
    assert read_png_texts(tmp_path / "x", ["hello"]) == {}


def test_only_texts_with_the_keys_are_decompressed(tmp_path, monkeypatch):
    decompressed, decompress = [], image_metadata._decompress
    monkeypatch.setattr(image_metadata, "_decompress", lambda data: decompressed.append(data) or decompress(data))
    path = write_texts(tmp_path / "x.png", zone="one", ztwo="two")
    more = [chunk(b"zTXt", b"zone\0\0" + zlib.compress(str(number).encode())) for number in range(9)]
    path.write_bytes(with_chunks(path.read_bytes(), *more))
    assert read_png_texts(path, ["zone"]) == {"zone": "one"}, "the last one counts"
    assert len(decompressed) == 1
    open_image(path)
    assert len(decompressed) == 1
