"""Face data sets: arrays and images, resized to squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image

from ldm.config.instantiate import get_obj_from_str, instantiate_from_config
from ldm.data import faceshq
from ldm.errors import UserError

FACE = {"height": 32, "width": 32}


def test_published_arrays_and_lists_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = [write(tmp_path / f"data/celebahq/imgHQ0000{i}.npy", height=32, width=32, seed=i) for i in range(3)]
    (tmp_path / "data/celebahqtrain.txt").write_text("imgHQ00002.npy\nimgHQ00000.npy\n")
    dataset = faceshq.CelebAHQTrain(size=32)
    assert [item["relative_file_path_"] for item in (dataset[0], dataset[1])] == ["imgHQ00002.npy", "imgHQ00000.npy"]
    assert np.array_equal(dataset[0]["image"], values(arrays[2]))


def test_images_of_any_folder_become_square(tmp_path):
    array = write(tmp_path / "x.png", height=24, width=36)
    image = faceshq.FFHQTrain(size=24, data_root=str(tmp_path))[0]["image"]
    assert np.array_equal(image, values(array[:, 6:30]))
    assert faceshq.FFHQValidation(size=8, data_root=str(tmp_path), keys=["image"])[0]["image"].shape == (8, 8, 3)


def test_bilinear_resizing_matches_opencv(tmp_path):
    """OpenCV's bilinear interpolation skips pixels: it averages the central 2 × 2 of each 4 × 4 pixels."""
    array = write(tmp_path / "x.png", height=32, width=32).astype(float)
    expected = array.reshape(8, 4, 8, 4, 3)[:, 1:3, :, 1:3].mean(axis=(1, 3))
    image = faceshq.FFHQTrain(size=8, data_root=str(tmp_path))[0]["image"]
    assert (image + 1) * 127.5 == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("name", ["CelebAHQTrain", "CelebAHQValidation", "FFHQTrain", "FFHQValidation"])
def test_taming_target_is_the_same_class(name, tmp_path, monkeypatch):
    assert get_obj_from_str(f"taming.data.faceshq.{name}") is getattr(faceshq, name)
    monkeypatch.chdir(tmp_path)
    folder = "data/celebahq" if name.startswith("Celeb") else "data/ffhq"
    with pytest.raises(UserError, match=f'{name}: there is no folder "{folder}"'):
        getattr(faceshq, name)(size=256)


@pytest.fixture
def faces(tmp_path, monkeypatch):
    """Create the published folders and lists: arrays of CelebA-HQ, and PNG files of FFHQ."""
    monkeypatch.chdir(tmp_path)
    arrays = {
        f"imgHQ0000{i}.npy": write(tmp_path / f"data/celebahq/imgHQ0000{i}.npy", seed=i, **FACE) for i in range(3)
    }
    arrays |= {f"0000{i}.png": write(tmp_path / f"data/ffhq/0000{i}.png", seed=10 + i, **FACE) for i in range(2)}
    (tmp_path / "data/celebahqtrain.txt").write_text("imgHQ00002.npy\nimgHQ00000.npy\n")
    (tmp_path / "data/celebahqvalidation.txt").write_text("imgHQ00001.npy\n")
    (tmp_path / "data/ffhqtrain.txt").write_text("00001.png\n")
    (tmp_path / "data/ffhqvalidation.txt").write_text("00000.png\n")
    return arrays


def test_both_sets_together_have_classes(faces):
    dataset = instantiate_from_config({"target": "taming.data.faceshq.FacesHQTrain", "params": {"size": 32}})
    assert [dataset[i]["class"] for i in range(len(dataset))] == [0, 0, 1]
    assert [dataset[i]["relative_file_path_"] for i in range(3)] == ["imgHQ00002.npy", "imgHQ00000.npy", "00001.png"]
    for i, name in enumerate(["imgHQ00002.npy", "imgHQ00000.npy", "00001.png"]):
        assert np.array_equal(dataset[i]["image"], values(faces[name]))
    assert set(faceshq.FacesHQValidation(32, keys=["image"])[1]) == {"image", "class"}


def test_validation_crop_is_central_and_has_coordinates(faces):
    item = faceshq.FacesHQValidation(32, crop_size=16, coord=True)[1]
    assert np.array_equal(item["image"], values(faces["00000.png"][8:24, 8:24])) and item["image"].dtype == np.float32
    positions = np.arange(32 * 32).reshape(32, 32, 1) / 1024
    assert np.array_equal(item["coord"], positions[8:24, 8:24])
    assert "coord" not in faceshq.FacesHQValidation(32, crop_size=16)[1]


def test_training_crop_is_random_and_agrees_with_its_coordinates(faces):
    dataset, whole = faceshq.FacesHQTrain(32, crop_size=16, coord=True), values(faces["00001.png"])
    torch.manual_seed(0)
    corners = set()
    for _ in range(20):
        item = dataset[2]
        top, left = divmod(round(float(item["coord"][0, 0, 0]) * 1024), 32)
        corners.add((top, left))
        assert np.array_equal(item["image"], whole[top : top + 16, left : left + 16])
    assert len(corners) > 10
    with pytest.raises(UserError, match="FacesHQTrain: crop_size 64 is larger than size 32"):
        faceshq.FacesHQTrain(32, crop_size=64)


def test_published_lists_name_copies_in_another_format(faces, tmp_path):
    folder = tmp_path / "data/celebahq"
    for path in list(folder.glob("*.npy")):
        Image.fromarray(np.moveaxis(np.load(path)[0], 0, -1)).save(path.with_suffix(".png"))
        path.unlink()
    dataset = faceshq.CelebAHQTrain(size=32)
    assert np.array_equal(dataset[0]["image"], values(faces["imgHQ00002.npy"]))
    assert dataset[1]["relative_file_path_"] == "imgHQ00000.npy" and dataset[1]["file_path_"].endswith("00000.png")
    assert len(dataset.data) == 2


def test_lists_of_absent_files_are_reported(faces, tmp_path):
    (tmp_path / "data/ffhqtrain.txt").write_text("00001.png\n00007.png\n")
    with pytest.raises(UserError, match=r"FFHQTrain: 1 of 2 images cannot be read .*00007.png") as raised:
        faceshq.FFHQTrain(size=32).check_files()
    assert "\n" not in str(raised.value)
    (tmp_path / "data/ffhqtrain.txt").unlink()
    with pytest.raises(UserError, match=r'there is no list "data/ffhqtrain.txt"'):
        faceshq.FFHQTrain(size=32)
