"""Face data sets: arrays and images, resized to squares."""

from __future__ import annotations

import numpy as np
import pytest
from images_on_disk import values, write

from ldm.config.instantiate import get_obj_from_str
from ldm.data import faceshq
from ldm.errors import UserError


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
