"""Tests of `ldm.io.label_maps`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from ldm.io.label_maps import read_label_map, read_palette, resize_nearest
from ldm.pipelines.semantic import label_colours

COLOURS = {"#87ceeb": 3, "#102030": 5}


def test_resizing_is_nearest_neighbour():
    labels = np.arange(12).reshape(3, 4)
    assert (resize_nearest(labels, 6, 8) == np.kron(labels, np.ones((2, 2), int))).all()
    assert (resize_nearest(labels, 3, 4) == labels).all()
    image = Image.fromarray(labels.astype(np.uint8))
    for height, width in ((1, 1), (2, 3), (7, 5), (30, 17)):
        expected = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
        assert (resize_nearest(labels, height, width) == expected).all()


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "1"])
def test_every_image_mode_of_numbers_holds_labels(tmp_path, mode):
    labels = np.array([[0, 1], [1, 0]]) * (1 if mode == "1" else 5)
    if mode == "P":
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette(bytes(range(256)) * 3)
    else:
        dtype = {"L": np.uint8, "I;16": np.uint16, "I": np.int32, "1": bool}[mode]
        image = Image.fromarray(labels.astype(dtype))
    path = tmp_path / ("x.tiff" if mode == "I" else "x.png")  # PNG lacks this mode
    image.save(path)
    assert read_label_map(path).tolist() == labels.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_map_is_rotated_by_its_exif_orientation(tmp_path, orientation):
    labels = np.arange(6).reshape(2, 3)
    rotated = {1: labels, 2: labels[:, ::-1], 3: labels[::-1, ::-1], 4: labels[::-1], 5: labels.T}
    rotated |= {6: np.rot90(labels, -1), 7: labels[::-1, ::-1].T, 8: np.rot90(labels)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "x.png", exif=exif)
    assert read_label_map(tmp_path / "x.png").tolist() == rotated[orientation].tolist()


def test_transparency_of_a_grey_map_is_ignored(tmp_path):
    values = np.stack([np.arange(6).reshape(2, 3), np.full((2, 3), 7)], axis=-1).astype(np.uint8)
    Image.fromarray(values, "LA").save(tmp_path / "x.png")
    assert read_label_map(tmp_path / "x.png").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "text"),
    [("p.txt", "#87CEEB 3 sky\n\n#102030 5 dark water\n"), ("p.json", json.dumps({"#87ceeb": 3, "#102030": 5}))],
)
def test_palette_assigns_labels_to_colours(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    palette = read_palette(tmp_path / name)
    assert palette == COLOURS
    colours = np.array([[[0x87, 0xCE, 0xEB], [0x10, 0x20, 0x30]]], np.uint8)
    indices = Image.fromarray(np.array([[1, 0]], np.uint8))
    indices.putpalette([*colours[0, 1], *colours[0, 0]])
    for image in (Image.fromarray(colours), Image.fromarray(colours).convert("RGBA"), indices):
        image.save(tmp_path / "x.png")
        assert read_label_map(tmp_path / "x.png", palette).tolist() == [[3, 5]]
    assert (label_colours(8, palette)[[3, 5]] == colours[0]).all()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_palette_is_read_in_every_encoding(tmp_path, encoding):
    (tmp_path / "p.txt").write_bytes("#87ceeb 3 sky\u2028#102030 4\r#102030 5\n".encode(encoding))
    assert read_palette(tmp_path / "p.txt") == COLOURS


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, 'there is no palette ".*none.txt"'), (b"\xff", "line 1 .* is not valid UTF-8; write lines such as")],
)
def test_unreadable_palette_raises_user_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "none.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_palette(tmp_path / "none.txt")


def test_unreadable_map_raises_user_error(tmp_path):
    with pytest.raises(UserError, match=r'there is no label map ".*none\.png"; check the path'):
        read_label_map(tmp_path / "none.png")
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r'cannot read the label map ".*x\.png": .*; give a PNG of labels'):
        read_label_map(tmp_path / "x.png")


@pytest.mark.parametrize("content", ["[1]", "{", '{"#87ceeb": "3"}', '{"#87ceeb": true}'])
def test_damaged_json_palette_raises_user_error(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match="palette"):
        read_palette(tmp_path / "p.json")


def test_error_names_a_colour_without_a_label(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0] = 255
    Image.fromarray(image).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"palette lacks 1 of the colours of .*, most frequently #000000 in 15 pixels"):
        read_label_map(tmp_path / "x.png", {"#ffffff": 1})


def test_examples_are_maps_of_known_labels(repo_root):
    folder = repo_root / "data/semantic_examples"
    palette = read_palette(folder / "colours.txt")
    for name in ("lake", "coast"):
        assert set(np.unique(read_label_map(folder / f"{name}.png", palette))) <= set(palette.values())
    assert (read_label_map(folder / "lake.png", palette) == read_label_map(folder / "lake.png")).all()
