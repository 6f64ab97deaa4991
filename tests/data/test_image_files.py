"""Image files: find, read, resize and crop them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import pixels, values, write
from PIL import Image

from ldm.data.image_files import (
    ImageFiles,
    ListedImages,
    crop_square,
    fit_square,
    images_below,
    pil_method,
    read_pixels,
    resize_smaller_side,
    to_image,
)
from ldm.errors import UserError


class Listed(ListedImages):
    list_file, folder = "lists/train.txt", "images"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create three images, a list of two of them and another file; return their parent, the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.JPG", "deep/c.webp"):
        write(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.md").write_text("x")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("deep/c.webp\n\nb.png\n")
    return tmp_path


# -- finding images --------------------------------------------------------------------------------------------


def test_images_come_from_list_folder_or_class_attributes(folder):
    names = lambda dataset: dataset.labels["relative_file_path_"]  # noqa: E731
    assert names(Listed()) == ["deep/c.webp", "b.png"]
    assert names(Listed(data_root="images")) == ["a.JPG", "b.png", "deep/c.webp"]
    (folder / "one.txt").write_text("b.png")
    assert names(Listed("one.txt", "images")) == names(Listed("one.txt")) == ["b.png"]


def test_linked_folders_are_followed(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "linked").symlink_to(folder / "images")
    assert images_below(folder / "elsewhere") == ["linked/a.JPG", "linked/b.png", "linked/deep/c.webp"]


def test_every_image_below_a_folder_is_found_and_other_files_are_counted(folder, caplog):
    caplog.set_level("INFO", "ldm")
    for name in ("d.gif", "e.jfif", "f.ppm", "g.npy", "._b.png", ".thumbnails/h.png", "deep/Thumbs.db", "deep/i.txt"):
        (folder / "images" / name).parent.mkdir(exist_ok=True)
        (folder / "images" / name).touch()
    names = ["a.JPG", "b.png", "d.gif", "deep/c.webp", "e.jfif", "f.ppm", "g.npy"]
    assert images_below(folder / "images") == names
    message = f'passed over 2 files in "{folder / "images"}" besides the images: deep/i.txt, notes.md'
    assert caplog.messages == [message]


@pytest.mark.parametrize("target", ["images", "."])
def test_a_link_to_a_parent_folder_adds_no_image(folder, target):
    for name in ("up", "deep/up"):
        (folder / "images" / name).symlink_to(folder / target)
    dataset = Listed(data_root="images")
    assert dataset.labels["relative_file_path_"] == ["a.JPG", "b.png", "deep/c.webp"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_split_at_line_ends_only(folder, encoding):
    (folder / "list.txt").write_bytes("b.png\ra\u2028\x85b.png\r\n".encode(encoding))
    assert Listed("list.txt").labels["relative_file_path_"] == ["b.png", "a\u2028\x85b.png"]


def test_list_that_is_not_text_raises_user_error(folder):
    (folder / "list.txt").write_bytes(b"b.png\n\xe9.png\n")
    with pytest.raises(UserError, match=r'cannot read the list of images "list.txt": line 2 \(byte 6\)'):
        Listed("list.txt")


def test_items_contain_paths_and_image(folder):
    item = Listed()[1]
    assert item.keys() == {"relative_file_path_", "file_path_", "image"}
    assert (item["relative_file_path_"], item["file_path_"]) == ("b.png", "images/b.png")
    assert np.array_equal(item["image"], values(pixels()))
    assert item["image"].dtype == np.float32
    assert Listed(keys=["image"])[0].keys() == {"image"}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_root": "image"}, 'Listed: there is no folder "image"; put the images there, or set data_root'),
        ({"txt_file": "train.txt"}, 'Listed: there is no list "train.txt"; set txt_file to one, or data_root alone'),
        ({"data_root": "lists"}, 'Listed: "lists" contains no image'),
    ],
)
def test_missing_list_or_folder_raises_user_error(params, message, folder):
    with pytest.raises(UserError, match=message) as raised:
        Listed(**params)
    assert "\n" not in str(raised.value)


def test_missing_data_root_raises_user_error():
    with pytest.raises(UserError, match="ListedImages needs data_root"):
        ListedImages()


# -- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.npy"])
def test_images_and_arrays_are_read(name, tmp_path):
    written = write(tmp_path / name)
    assert np.array_equal(read_pixels(tmp_path / name), written)
    assert ImageFiles([tmp_path / name], {"n": [7]})[0]["n"] == 7


def test_array_channels_can_be_first_or_last(tmp_path):
    array = pixels()
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", array.transpose(2, 0, 1))
    assert np.array_equal(read_pixels(tmp_path / "last.npy"), read_pixels(tmp_path / "first.npy"))


def test_invalid_arrays_and_files_raise_user_error(tmp_path):
    np.save(tmp_path / "gray.npy", np.zeros((8, 8), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((8, 8, 3)))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object))
    (tmp_path / "text.png").write_text("x")
    for name, message in [
        ("gray.npy", r"is not an image: its shape is \(8, 8\)"),
        ("float.npy", "its dtype float64"),
        ("object.npy", "cannot read the image"),
        ("text.png", "cannot read the image"),
        ("none.png", "there is no image"),
    ]:
        with pytest.raises(UserError, match=message):
            read_pixels(tmp_path / name)


# -- squares ---------------------------------------------------------------------------------------------------


def test_image_values_are_in_minus_one_to_one():
    assert to_image(np.array([0, 51, 255], np.uint8)).tolist() == pytest.approx([-1.0, -0.6, 1.0])


@pytest.mark.parametrize(("shape", "expected"), [((24, 36), (8, 12)), ((37, 24), (12, 8)), ((5, 5), (8, 8))])
def test_smaller_side_is_resized(shape, expected):
    assert resize_smaller_side(pixels(*shape), 8).shape == (*expected, 3)


def test_area_averages_when_shrinking_and_is_bilinear_when_enlarging():
    array = pixels(24, 36)
    assert np.array_equal(resize_smaller_side(array, 24), array)
    means = array.reshape(8, 3, 12, 3, 3).mean(axis=(1, 3))
    assert resize_smaller_side(array, 8, "area").astype(float) == pytest.approx(means, abs=0.51)
    assert np.array_equal(resize_smaller_side(array, 30, "area"), resize_smaller_side(array, 30, "bilinear"))


def test_crops_are_central_or_random():
    array = pixels(24, 36)
    assert np.array_equal(crop_square(array, 10), array[7:17, 13:23])
    assert np.array_equal(fit_square(array, 24), array[:, 6:30])
    torch.manual_seed(0)
    corners = {
        crop_square(np.indices((12, 13)).transpose(1, 2, 0), 10, random=True)[0, 0].tobytes() for _ in range(200)
    }
    assert len(corners) == 3 * 4, "every position occurs"


def test_interpolation_names_map_to_pillow():
    assert pil_method("linear") is pil_method("bilinear") is Image.Resampling.BILINEAR
    with pytest.raises(UserError, match='no interpolation "bicubik" \\(did you mean "bicubic"'):
        pil_method("bicubik")
