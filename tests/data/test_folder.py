"""Data sets of one's own images: formats, crops, captions, classes, and rows that are left out."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from images_on_disk import pixels, values, write
from PIL import Image

from ldm.data.folder import FolderTrain, FolderValidation
from ldm.errors import UserError


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    """Leave informative log lines out, also after a test that asked for them."""
    caplog.set_level("WARNING", "ldm")


def names(dataset):
    return dataset.labels["relative_file_path_"]


def captions(dataset):
    return dict(zip(names(dataset), dataset.labels["caption"], strict=True))


@pytest.fixture
def folder(tmp_path):
    """Return a folder with two classes of two images."""
    for number, name in enumerate(("cats/a.png", "cats/b.png", "dogs/c.png", "dogs/d.png")):
        write(tmp_path / name, seed=number)
    return tmp_path


# -- images ----------------------------------------------------------------------------------------------------


def save(path, mode, **options):
    image = Image.fromarray(pixels(24, 24))
    if mode == "16 bits":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    image.save(path, **options)


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("x.png", "RGB", 0),
        ("x.png", "RGBA", 0),
        ("x.png", "L", 0),
        ("x.png", "LA", 0),
        ("x.png", "1", 0),
        ("x.png", "16 bits", 0),
        ("x.gif", "P", 0),
        ("x.png", "P", 0),
        ("x.tif", "CMYK", 0),
        ("x.jpg", "CMYK", 40),
        ("x.jpg", "L", 30),
        ("x.bmp", "RGB", 0),
    ],
)
def test_images_of_any_mode_are_read(name, mode, tolerance, tmp_path):
    save(tmp_path / name, mode)
    (image,) = [item["image"] for item in FolderValidation(str(tmp_path), size=24)]
    reference = Image.fromarray(pixels(24, 24))
    expected = reference.convert("L" if mode == "16 bits" else mode).convert("RGB")
    assert image.shape == (24, 24, 3) and image.dtype == np.float32
    assert np.abs(image - values(np.asarray(expected))).max() * 127.5 <= tolerance


def test_transparent_parts_are_white(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    Image.fromarray(np.dstack([pixels(8, 8), alpha])).save(tmp_path / "x.png")
    image = FolderValidation(str(tmp_path), size=8)[0]["image"]
    assert np.array_equal(image[:4], values(pixels(8, 8))[:4]) and (image[4:] == 1).all()


@pytest.mark.parametrize(("name", "side", "tolerance"), [("x.png", 16, 0), ("x.jpg", 16, 0.1), ("x.jpg", 128, 0.1)])
def test_rotation_in_the_metadata_is_applied(name, side, tolerance, tmp_path):
    image = Image.fromarray(pixels(16, 16)).resize((side, side))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees, counterclockwise
    image.save(tmp_path / name, exif=exif, quality=95)
    found = FolderValidation(str(tmp_path), size=16)[0]["image"]
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert np.abs(found - values(np.rot90(expected, -1))).mean() <= tolerance


def test_arrays_are_read(tmp_path):
    array = write(tmp_path / "x.npy", height=8, width=8)
    assert np.array_equal(FolderValidation(str(tmp_path), size=8)[0]["image"], values(array))


@pytest.mark.parametrize(("height", "width"), [(24, 36), (37, 24), (5, 5), (200, 9), (8, 8)])
def test_images_of_any_size_become_squares(height, width, tmp_path):
    write(tmp_path / "x.png", height=height, width=width)
    assert FolderTrain(str(tmp_path), size=8)[0]["image"].shape == (8, 8, 3)


def test_validation_crops_at_the_centre_and_never_mirrors(tmp_path):
    array = write(tmp_path / "x.png", height=24, width=36)
    dataset = FolderValidation(str(tmp_path), size=24)
    state = torch.get_rng_state()
    assert all(np.array_equal(dataset[0]["image"], values(array[:, 6:30])) for _ in range(3))
    assert torch.equal(torch.get_rng_state(), state), "no random number is used"


def test_training_crops_at_every_position_and_mirrors_half_of_the_time(tmp_path):
    array = np.zeros((8, 12, 3), np.uint8)
    array[..., 0], array[..., 1] = np.arange(12), np.arange(8)[:, None]
    Image.fromarray(array).save(tmp_path / "x.png")
    dataset = FolderTrain(str(tmp_path), size=8)
    torch.manual_seed(0)
    views = [(dataset[0]["image"] * 127.5 + 127.5).round().astype(int) for _ in range(400)]
    starts = [(view[0, 0, 0], view[0, -1, 0]) for view in views]
    assert {*starts} == {*((left, left + 7) for left in range(5)), *((left + 7, left) for left in range(5))}
    assert 150 < sum(first > last for first, last in starts) < 250
    assert all(np.array_equal(view[:, 0, 1], np.arange(8)) for view in views)


def test_same_seed_returns_the_same_view(folder):
    dataset = FolderTrain(str(folder), size=8)
    torch.manual_seed(3)
    first = dataset[0]["image"]
    torch.manual_seed(3)
    assert np.array_equal(dataset[0]["image"], first)


def test_resizing_averages_all_pixels(tmp_path):
    checkers = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    Image.fromarray(checkers).save(tmp_path / "x.png")
    assert np.abs(FolderValidation(str(tmp_path), size=8)[0]["image"]).max() < 0.05


def test_large_jpeg_is_decoded_at_a_reduced_size(tmp_path):
    Image.fromarray(pixels(512, 768)).save(tmp_path / "x.jpg", quality=95)
    dataset = FolderValidation(str(tmp_path), size=64)
    image, _ = dataset.read(0)
    assert image.size == (192, 128), "the smaller side is twice the size of the item"
    full = Image.open(tmp_path / "x.jpg").resize((96, 64), Image.Resampling.BICUBIC)
    expected = values(np.asarray(full)[:, 16:80])
    assert np.abs(dataset[0]["image"] - expected).mean() < 0.02
    assert FolderValidation(str(tmp_path), size=256).read(0)[0].size == (768, 512)


# -- captions --------------------------------------------------------------------------------------------------


def test_captions_come_from_text_files(folder, caplog):
    caplog.set_level("INFO", "ldm")
    for name in ("cats/a", "cats/b", "dogs/c", "dogs/d"):
        (folder / f"{name}.txt").write_text(f"  a photo\nof {name} ")
    assert captions(FolderTrain(str(folder), caption="txt"))["cats/a.png"] == "a photo of cats/a"
    assert not caplog.records, "caption files are no other files"


def test_captions_come_from_names(tmp_path):
    for name in ("red-car_01.png", "blue_boat (2).png", "sky.2.png"):
        write(tmp_path / name)
    assert [*captions(FolderTrain(str(tmp_path), caption="name")).values()] == ["blue boat", "red car", "sky"]


def test_images_without_a_caption_are_named_in_one_line_and_left_out(folder, caplog):
    (folder / "cats/a.txt").write_text("a cat")
    (folder / "cats/b.txt").write_text(" \n")
    (folder / "dogs/c.txt").write_bytes("chien blessé".encode("latin-1"))
    assert captions(FolderTrain(str(folder), caption="txt")) == {"cats/a.png": "a cat"}
    assert caplog.messages == [
        "FolderTrain: 1 of 4 images have a caption beside them that is not valid UTF-8 and are left out: dogs/c.png",
        "FolderTrain: 2 of 3 images have no caption beside them and are left out: cats/b.png, dogs/d.png",
    ]


def test_no_caption_at_all_is_an_error(folder):
    with pytest.raises(UserError, match="FolderTrain: all 4 images have no caption beside them; write each into a"):
        FolderTrain(str(folder), caption="txt")


# -- classes ---------------------------------------------------------------------------------------------------


def test_classes_come_from_the_names_of_folders(folder):
    dataset = FolderTrain(str(folder), label="folder")
    assert dataset.class_names == ["cats", "dogs"]
    assert [(item["class_label"], item["human_label"]) for item in dataset] == [(0, "cats")] * 2 + [(1, "dogs")] * 2


def test_class_names_determine_the_labels(folder, caplog):
    (folder / "names.txt").write_text("Dogs\tpuppies\nfish\n")
    dataset = FolderTrain(str(folder), label="folder", class_names=str(folder / "names.txt"))
    assert dataset.class_names == ["Dogs", "fish"]
    assert dataset.labels["class_label"] == [0, 0] and dataset.labels["human_label"] == ["Dogs", "Dogs"]
    assert caplog.messages == [
        "FolderTrain: 2 of 4 images have a class that is not among the 2 class_names (cats) and are left out: "
        "cats/a.png, cats/b.png"
    ]


def test_class_folders_that_are_numbers_are_sorted_by_value(tmp_path):
    for name in ("10/a.png", "9/b.png", "x.png"):
        write(tmp_path / name)
    dataset = FolderTrain(str(tmp_path), label="folder")
    assert dataset.class_names == ["9", "10"] and names(dataset) == ["10/a.png", "9/b.png"]
    assert dataset.labels["class_label"] == [1, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes")
def test_class_names_are_single_lines_of_valid_text(tmp_path, caplog):
    for folder in ("a\tb", "a\nb", " c ", "bad\udcff", " "):
        write(tmp_path / folder / "0.png")
    dataset = FolderTrain(str(tmp_path), size=8, label="folder")
    assert dataset.class_names == ["a b", "c"]
    assert dataset.labels["human_label"] == ["c", "a b", "a b"]
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "1 of 5 images are in a folder whose name is not valid UTF-8 and are left out: bad\\udcff/0.png",
        "1 of 4 images are in no folder of a class and are left out:  /0.png",
    ]


def test_repeated_class_names_raise_user_error(folder):
    with pytest.raises(UserError, match='class_names lists the class "cats" twice'):
        FolderTrain(str(folder), label="folder", class_names=["cats", "dogs", "cats"])


# -- lists and tables ------------------------------------------------------------------------------------------


def test_list_names_the_images(folder):
    (folder / "list.txt").write_text("dogs/d.png\n\ncats/a.png\ndogs/d.png\n")
    dataset = FolderTrain(files=str(folder / "list.txt"))
    assert names(dataset) == ["dogs/d.png", "cats/a.png"], "a repeated row counts once"
    assert dataset[0]["file_path_"] == str(folder / "dogs/d.png")


def test_list_may_lie_elsewhere(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/list.txt").write_text(f"cats/a.png\n{folder}/cats/b.png\n")
    dataset = FolderTrain(str(folder), str(tmp_path / "elsewhere/list.txt"))
    assert [path.is_file() for path in dataset.paths] == [True, True]


def test_table_has_captions_and_labels(folder):
    (folder / "t.csv").write_text('path,text,kind\ncats/a.png,"a cat, sleeping",cat\ndogs/c.png,a dog,dog\n')
    dataset = FolderTrain(files=str(folder / "t.csv"), caption="text", label="kind")
    assert captions(dataset) == {"cats/a.png": "a cat, sleeping", "dogs/c.png": "a dog"}
    assert dataset.class_names == ["cat", "dog"] and dataset.labels["class_label"] == [0, 1]


def test_image_with_several_captions_has_several_rows(folder):
    (folder / "t.csv").write_text("path,text\ncats/a.png,one\ncats/a.png,two\ncats/a.png,two\n")
    dataset = FolderTrain(files=str(folder / "t.csv"), caption="text")
    assert dataset.labels["caption"] == ["one", "two"]


def test_list_of_captions_makes_several_rows(folder):
    rows = [{"path": "cats/a.png", "text": ["one", "two"]}, {"path": "dogs/c.png", "text": "three"}]
    rows += [{"path": "cats/b.png", "text": []}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = FolderTrain(files=str(folder / "t.jsonl"), caption="text", label="folder")
    assert dataset.labels["caption"] == ["one", "two", "three"]
    assert dataset.labels["class_label"] == [0, 0, 1]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_of_an_image_folder_is_found(name, folder):
    rows = [{"file_name": "cats/b.png", "text": "a cat"}, {"file_name": "dogs/c.png", "text": "a dog"}]
    lines = [json.dumps(row) for row in rows] if name.endswith("jsonl") else ["file_name,text"]
    lines += [] if name.endswith("jsonl") else [",".join(row.values()) for row in rows]
    (folder / name).write_text("\n".join(lines))
    assert captions(FolderTrain(str(folder), caption="text")) == {"cats/b.png": "a cat", "dogs/c.png": "a dog"}
    assert len(FolderTrain(str(folder))) == 4, "without a column, all images count"


def test_numbers_of_a_column_are_labels(folder, caplog):
    (folder / "t.csv").write_text("path,kind\ncats/a.png,3\ncats/b.png,-1\ndogs/c.png,\ndogs/d.png,0\n")
    dataset = FolderTrain(files=str(folder / "t.csv"), label="kind")
    assert dataset.labels["class_label"] == [3, 0] and dataset.labels["human_label"] == ["3", "0"]
    assert dataset.class_names == []
    assert caplog.messages == [
        'FolderTrain: 1 of 4 images have no class in the column "kind" and are left out: dogs/c.png',
        "FolderTrain: 1 of 3 images have a label below 0 and are left out: cats/b.png",
    ]


def test_labels_beyond_the_class_names_are_left_out(folder, caplog):
    (folder / "t.csv").write_text("path,kind\ncats/a.png,1\ncats/b.png,2\ndogs/c.png,dog\n")
    dataset = FolderTrain(files=str(folder / "t.csv"), label="kind", class_names=["cat", "dog"])
    assert dataset.labels["class_label"] == [1, 1] and dataset.labels["human_label"] == ["dog", "dog"]
    (message,) = caplog.messages
    assert message.endswith("not among the 2 class_names (2) and are left out: cats/b.png")


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "FolderTrain needs data_root, the folder of the images, or files, a list or table of them"),
        ({"data_root": "absent"}, 'FolderTrain: there is no folder "absent"'),
        ({"data_root": "empty"}, 'FolderTrain: the folder "empty" contains no image; name the folder of the'),
        ({"files": "absent.txt"}, 'FolderTrain: cannot read the list "absent.txt": No such file or directory'),
        ({"files": "absent.csv"}, 'there is no table "absent.csv"; check the path'),
        ({"files": "empty.txt"}, 'FolderTrain: the list "empty.txt" names no image; write one path a line'),
        ({"data_root": "one", "caption": "text"}, 'caption names the column "text", and there is no table; set files'),
        ({"files": "t.csv", "caption": "txet"}, 'no column "txet" (did you mean "text"?); its columns are path, text'),
        ({"data_root": "one", "size": 0}, "FolderTrain: size must be an integer of at least 1, not 0"),
        ({"data_root": "one", "crop": "centre"}, 'there is no crop "centre" (did you mean "center"?)'),
        ({"data_root": "one", "flip_p": 2}, "flip_p is a probability from 0 to 1, not 2"),
        ({"data_root": "one", "max_unreadable": "1%"}, "max_unreadable is a share from 0 to 1, such as 0.01, or null"),
        ({"data_root": "one", "label": "folder"}, "all 1 images are in no folder of a class; move them"),
        ({"files": "absences.txt"}, "FolderTrain: 2 of 3 images cannot be read (no.png, nor.png), more than max_unr"),
    ],
)
def test_bad_parameters_raise_user_error_of_one_line(params, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "one/x.png")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "absences.txt").write_text("no.png\none/x.png\nnor.png\n")
    (tmp_path / "t.csv").write_text("path,text\none/x.png,x\n")
    with pytest.raises(UserError) as raised:
        FolderTrain(**params)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_unreadable_images_below_the_limit_are_left_out(folder, caplog):
    (folder / "cats/bad.png").write_bytes(b"no image")
    dataset = FolderTrain(str(folder), max_unreadable=0.2)
    assert names(dataset) == ["cats/a.png", "cats/b.png", "dogs/c.png", "dogs/d.png"]
    assert caplog.messages == ["FolderTrain: 1 of 5 images cannot be read and are left out: cats/bad.png"]


def test_names_that_are_not_valid_text_are_files_too(tmp_path, caplog):
    name = b"caf\xe9.png"
    try:
        (tmp_path / "x.png").write_bytes(b"")
        path = bytes(tmp_path) + b"/" + name
        with open(path, "wb") as file:
            Image.fromarray(pixels()).save(file, format="PNG")
    except OSError:
        pytest.skip("this file system has only valid names")
    (tmp_path / "list.txt").write_bytes(name + b"\nx.png\n")
    dataset = FolderTrain(files=str(tmp_path / "list.txt"), size=8, max_unreadable=0.5)
    assert dataset[0]["image"].shape == (8, 8, 3) and len(dataset) == 1
