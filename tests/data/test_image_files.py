"""Pictures in files: finding, reading, resizing and cropping them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import pixels, values, write
from PIL import Image

from ldm.data.image_files import (
    ListedPictures,
    PictureFiles,
    crop_square,
    fit_square,
    images_below,
    pil_method,
    read_pixels,
    resize_smaller_side,
    to_image,
)
from ldm.errors import UserError


class Listed(ListedPictures):
    list_file, folder = "lists/train.txt", "pictures"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three pictures, a list of two of them, and something else; the current folder is the one around them."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "deep/c.webp"):
        write(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.md").write_text("x")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("deep/c.webp\n\nb.png\n")
    return tmp_path


# -- which pictures --------------------------------------------------------------------------------------------


def test_a_list_a_folder_or_the_classs_own(folder):
    names = lambda dataset: dataset.labels["relative_file_path_"]  # noqa: E731
    assert names(Listed()) == ["deep/c.webp", "b.png"]
    assert names(Listed(data_root="pictures")) == ["a.JPG", "b.png", "deep/c.webp"]
    (folder / "one.txt").write_text("b.png")
    assert names(Listed("one.txt", "pictures")) == names(Listed("one.txt")) == ["b.png"]


def test_linked_folders_are_entered(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "linked").symlink_to(folder / "pictures")
    assert images_below(folder / "elsewhere") == ["linked/a.JPG", "linked/b.png", "linked/deep/c.webp"]


def test_items_hold_names_and_the_picture(folder):
    item = Listed()[1]
    assert item.keys() == {"relative_file_path_", "file_path_", "image"}
    assert (item["relative_file_path_"], item["file_path_"]) == ("b.png", "pictures/b.png")
    assert np.array_equal(item["image"], values(pixels()))
    assert item["image"].dtype == np.float32
    assert Listed(keys=["image"])[0].keys() == {"image"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_root": "picture"}, 'Listed: there is no folder "picture"; put the pictures there, or set data_root'),
        ({"txt_file": "train.txt"}, 'Listed: there is no list "train.txt"; set txt_file to one, or data_root alone'),
        ({"data_root": "lists"}, 'Listed: "lists" names no picture'),
    ],
)
def test_what_is_missing_is_named(params, message, folder):
    with pytest.raises(UserError, match=message) as raised:
        Listed(**params)
    assert "\n" not in str(raised.value)


def test_without_any_folder_there_is_nothing_to_show():
    with pytest.raises(UserError, match="ListedPictures needs data_root"):
        ListedPictures()


# -- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.npy"])
def test_pictures_and_arrays_are_read(name, tmp_path):
    written = write(tmp_path / name)
    assert np.array_equal(read_pixels(tmp_path / name), written)
    assert PictureFiles([tmp_path / name], {"n": [7]})[0]["n"] == 7


def test_arrays_in_either_order(tmp_path):
    array = pixels()
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", array.transpose(2, 0, 1))
    assert np.array_equal(read_pixels(tmp_path / "last.npy"), read_pixels(tmp_path / "first.npy"))


def test_other_arrays_and_files_are_refused(tmp_path):
    np.save(tmp_path / "gray.npy", np.zeros((8, 8), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((8, 8, 3)))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    (tmp_path / "text.png").write_text("x")
    for name, message in [
        ("gray.npy", r"is no picture: its shape is \(8, 8\)"),
        ("float.npy", "its type float64"),
        ("object.npy", "cannot read the picture"),
        ("text.png", "cannot read the picture"),
        ("none.png", "there is no picture"),
    ]:
        with pytest.raises(UserError, match=message):
            read_pixels(tmp_path / name)


# -- squares ---------------------------------------------------------------------------------------------------


def test_values_lie_between_minus_one_and_one():
    assert to_image(np.array([0, 51, 255], np.uint8)).tolist() == pytest.approx([-1.0, -0.6, 1.0])


@pytest.mark.parametrize(("shape", "expected"), [((24, 36), (8, 12)), ((37, 24), (12, 8)), ((5, 5), (8, 8))])
def test_the_smaller_side_is_resized(shape, expected):
    assert resize_smaller_side(pixels(*shape), 8).shape == (*expected, 3)


def test_area_averages_and_enlarging_is_bilinear():
    array = pixels(24, 36)
    assert np.array_equal(resize_smaller_side(array, 24), array)
    means = array.reshape(8, 3, 12, 3, 3).mean(axis=(1, 3))
    assert resize_smaller_side(array, 8, "area").astype(float) == pytest.approx(means, abs=0.51)
    assert np.array_equal(resize_smaller_side(array, 30, "area"), resize_smaller_side(array, 30, "bilinear"))


def test_crops_are_from_the_middle_or_from_anywhere():
    array = pixels(24, 36)
    assert np.array_equal(crop_square(array, 10), array[7:17, 13:23])
    assert np.array_equal(fit_square(array, 24), array[:, 6:30])
    torch.manual_seed(0)
    corners = {
        crop_square(np.indices((12, 13)).transpose(1, 2, 0), 10, random=True)[0, 0].tobytes() for _ in range(200)
    }
    assert len(corners) == 3 * 4, "every place comes up"


def test_methods_are_pillows():
    assert pil_method("linear") is pil_method("bilinear") is Image.Resampling.BILINEAR
    with pytest.raises(UserError, match='no interpolation "bicubik" \\(did you mean "bicubic"'):
        pil_method("bicubik")
