"""Tests of `ldm.preparation.inspection`."""

from __future__ import annotations

import numpy as np
import pytest
from odd_photographs import COPIES, COUNT, DAMAGED, ROTATED, write_odd_photographs
from PIL import Image

from ldm.data.image_files import images_below
from ldm.io.images import open_image
from ldm.preparation.inspection import Inspection, inspect_file


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_odd_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def inspection(photographs):
    files = images_below(photographs)
    return Inspection.of(files, [photographs / file for file in files])


def test_facts_are_those_of_the_images(photographs, inspection):
    assert len(inspection.files) == COUNT
    for file, facts in zip(inspection.files, inspection.facts, strict=True):
        if file != DAMAGED:
            assert (facts.width, facts.height) == open_image(photographs / file).size, file
            with Image.open(photographs / file) as image:
                assert (facts.mode, facts.kind) == (image.mode, image.format), file


def test_rotation_in_the_metadata_exchanges_width_and_height(inspection):
    facts = inspection.facts[inspection.files.index(ROTATED)]
    assert (facts.width, facts.height, facts.side) == (48, 80, 48)


def test_damaged_files_and_copies_are_named(inspection):
    assert [inspection.files[index] for index in inspection.damaged] == [DAMAGED]
    assert inspection.copies == [list(COPIES)]
    lines = list(inspection.lines())
    assert lines[0].startswith("63 images: 44 × 41 to ")
    assert lines[1].startswith("formats: JPEG 30, PNG 17") and "CMYK 7" in lines[1] and "I;16 8" in lines[1]
    assert lines[2] == f"left out: 1 file that cannot be read: {DAMAGED}"
    assert lines[3].endswith(f"{COPIES[0]} = {COPIES[1]}") and len(lines) == 4


def test_images_smaller_than_a_size_are_found(inspection):
    found = inspection.smaller_than(50)
    assert found and all(inspection.facts[index].side < 50 and not inspection.facts[index].fault for index in found)
    assert len(found) == sum(facts.side < 50 for facts in inspection.readable)


def test_large_photographs_have_their_full_size(tmp_path):
    """A large JPEG is decoded at a reduced size."""
    pixels = np.random.default_rng(0).integers(0, 255, (1400, 2100, 3), np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 8
    image.save(tmp_path / "a.jpg", exif=exif)
    facts = inspect_file(tmp_path / "a.jpg")
    assert (facts.width, facts.height) == (1400, 2100)


def test_equal_pixels_in_other_files_are_copies(tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 9, 3), np.uint8))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    np.save(tmp_path / "c.npy", np.asarray(image))
    image.putpixel((0, 0), (1, 2, 3))
    image.save(tmp_path / "d.png")
    digests = [inspect_file(tmp_path / name).digest for name in ("a.png", "b.bmp", "c.npy", "d.png")]
    assert digests[0] == digests[1] == digests[2] != digests[3]


@pytest.mark.parametrize(("name", "content"), [("a.png", b"no image"), ("a.npy", b"no array"), ("gone.png", None)])
def test_files_that_are_no_images_have_a_fault(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    facts = inspect_file(tmp_path / name)
    assert name in facts.fault and "\n" not in facts.fault and not facts.digest


def test_images_with_32_bits_have_a_fault(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    assert "32 bits" in inspect_file(tmp_path / "a.tif").fault
