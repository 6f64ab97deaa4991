"""LSUN: central squares, randomly mirrored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.data import lsun
from ldm.errors import UserError


@pytest.fixture
def churches(tmp_path, monkeypatch):
    """Create the published lists and images of churches; return the pixels of an image."""
    monkeypatch.chdir(tmp_path)
    array = write(tmp_path / "data/lsun/churches/ab/one.webp")
    array = np.asarray(Image.open(tmp_path / "data/lsun/churches/ab/one.webp").convert("RGB"))
    for split in ("train", "val"):
        (tmp_path / f"data/lsun/church_outdoor_{split}.txt").write_text("ab/one.webp\n")
    return array


def test_central_square_is_resized_by_pillow(churches):
    config = {"target": "ldm.data.lsun.LSUNChurchesValidation", "params": {"size": 16}}
    item = instantiate_from_config(config)[0]
    expected = Image.fromarray(churches[:, 6:30]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(item["image"], values(np.asarray(expected)))
    assert item["relative_file_path_"] == "ab/one.webp"
    assert lsun.LSUNChurchesValidation()[0]["image"].shape == (24, 24, 3)
    nearest = lsun.LSUNChurchesValidation(size=12, interpolation="nearest")[0]["image"]
    assert np.array_equal(nearest, values(churches[1::2, 7:30:2]))


def test_half_of_training_images_are_mirrored(churches):
    dataset = lsun.LSUNChurchesTrain(size=16)
    plain = lsun.LSUNChurchesTrain(size=16, flip_p=0.0)[0]["image"]
    torch.manual_seed(0)
    images = [dataset[0]["image"] for _ in range(100)]
    mirrored = sum(np.array_equal(image, plain[:, ::-1]) for image in images)
    assert mirrored + sum(np.array_equal(image, plain) for image in images) == 100
    assert 35 <= mirrored <= 65  # three standard deviations


def test_missing_published_folder_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, where in [
        ("LSUNBedroomsTrain", "data/lsun/bedrooms"),
        ("LSUNCatsValidation", "data/lsun/cats"),
        ("LSUNChurchesTrain", "data/lsun/churches"),
    ]:
        with pytest.raises(UserError, match=f'{name}: there is no folder "{where}"'):
            getattr(lsun, name)(size=256)
        (tmp_path / where).mkdir(parents=True)
    with pytest.raises(UserError, match=r'there is no list "data/lsun/bedrooms_train\.txt"'):
        lsun.LSUNBedroomsTrain(size=256)


def test_unknown_interpolation_raises_user_error(churches):
    with pytest.raises(UserError, match='did you mean "bicubic"'):
        lsun.LSUNChurchesTrain(interpolation="bicubc")
