"""Tests of `ldm.io.image_formats`."""

from __future__ import annotations

import pytest
from PIL import Image, features

from ldm.errors import UserError
from ldm.io.image_formats import FORMATS, LOSSY, image_suffixes, readable_formats
from ldm.io.images import open_image

COMMON = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".tga"),
    *(".jp2", ".ico", ".psd"),
)


def test_suffixes_are_those_of_formats_that_are_read():
    suffixes = image_suffixes()
    assert {*COMMON} <= {*suffixes} and list(suffixes) == sorted(suffixes)
    assert not {*suffixes} & {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".txt", ".npy", ".json"}
    assert ".avif" in suffixes or "avif" not in features.get_supported_modules()


def test_lossy_formats_can_be_left_out():
    suffixes = image_suffixes(without=LOSSY)
    assert {".png", ".gif", ".pgm", ".tiff", ".webp", ".bmp"} <= {*suffixes}
    assert not {*suffixes} & {".jpg", ".jpe", ".avif", ".jp2", ".mpo"}


def test_common_formats_are_tried_first():
    formats = readable_formats()
    assert {*formats[:6]} == {"BMP", "DIB", "GIF", "JPEG", "PPM", "PNG"} and {*formats} <= FORMATS


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".pcx", ".ppm", ".sgi", ".tga"])
def test_every_listed_format_is_read(tmp_path, suffix):
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"x{suffix}")
    assert open_image(tmp_path / f"x{suffix}").size == (16, 16)


def test_formats_that_run_programs_are_refused(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("ran Ghostscript"))
    Image.new("RGB", (16, 16)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(UserError, match=r'x\.png": it is not an image, or is damaged'):
        open_image(tmp_path / "x.png")
