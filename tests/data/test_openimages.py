"""OpenImages: crops and pairs from folders; and data sets that are not included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write

from ldm.data import landscapes, openimages
from ldm.data.previews import pytorch_dataset
from ldm.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create the published folders; return the pixels of the validation image."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/openimages/train/x.png")
    return write(tmp_path / "data/openimages/validation/x.png")


def test_training_crops_are_random_and_validation_crops_are_central(folder):
    item = openimages.FullOpenImagesValidation(crop_size=16)[0]
    assert np.array_equal(item["image"], values(folder[4:20, 10:26]))
    assert item["relative_file_path_"] == "x.png"
    dataset = openimages.FullOpenImagesTrain(crop_size=16)
    torch.manual_seed(0)
    images = [dataset[0]["image"] for _ in range(20)]
    assert {image.shape for image in images} == {(16, 16, 3)} and len({image.tobytes() for image in images}) > 10


def test_image_is_resized_before_cropping(folder):
    image = openimages.FullOpenImagesValidation(size=12, crop_size=8)[0]["image"]
    means = folder.reshape(12, 2, 18, 2, 3).mean(axis=(1, 3))[2:10, 5:13]
    assert (image + 1) * 127.5 == pytest.approx(means, abs=0.51)
    assert openimages.FullOpenImagesValidation(size=12)[0]["image"].shape == (12, 12, 3)
    assert openimages.FullOpenImagesValidation(crop_size=64)[0]["image"].shape == (64, 64, 3)


def test_super_resolution_pairs_with_published_parameters(folder):
    params = {"degradation": "bsrgan_light", "downscale_f": 4, "min_crop_f": 0.5, "max_crop_f": 1.0}
    for kind in (openimages.SuperresOpenImagesAdvancedTrain, openimages.SuperresOpenImagesAdvancedValidation):
        item = kind(size=16, random_crop=True, **params)[0]
        assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (openimages.OpenImagesBBoxTrain, '"coordinates_bbox"'),
        (openimages.OpenImagesBBoxValidation, '"coordinates_bbox"'),
        (landscapes.RFWTrain, '"segmentation"'),
        (landscapes.RFWValidation, '"segmentation"'),
        (pytorch_dataset.PreviewsTrain, "ldm.data.emoji.EmojiTrain"),
        (pytorch_dataset.PreviewsValidation, "ldm.data.emoji.EmojiValidation"),
    ],
)
def test_absent_data_set_raises_user_error_with_alternative(kind, text):
    with pytest.raises(UserError, match=f"{kind.__name__} is not included: it provided .*{text}.*") as raised:
        kind(size=256, anything="else")
    assert "\n" not in str(raised.value) and "; " in str(raised.value)
