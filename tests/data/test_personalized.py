"""Tests of `ldm.data.personalized` and `ldm.data.text_inpainting`: data sets for training Stable Diffusion."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.inpainting import MaskedPictures
from ldm.data.personalized import OBJECT, STYLE, PersonalizedBase
from ldm.data.text_inpainting import MaskedImages
from ldm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        pixels = np.zeros((24, 48, 3), np.uint8)
        pixels[:, 12:24] = 255  # the left half of the central square
        pixels[..., 2] = 60 * index
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    return tmp_path


def test_every_image_occurs_with_each_template(folder):
    dataset = PersonalizedBase(str(folder), size=8, repeats=27, placeholder_token="<cat>")
    assert len(dataset) == 3 * 27
    items = [dataset[index] for index in range(len(dataset))]
    pairs = {(item["relative_file_path_"], item["caption"]) for item in items}
    assert pairs == {(f"{index}.png", text.replace("{}", "<cat>")) for index in range(3) for text in OBJECT}
    assert all(item["image"].shape == (8, 8, 3) and item["image"].dtype == np.float32 for item in items)
    assert dataset.entries(80) == {key: value for key, value in items[80].items() if key != "image"}
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_validation_has_each_image_once_and_unmirrored(folder):
    dataset = PersonalizedBase(str(folder), size=8, set="val", templates="style", coarse_class_text="old")
    assert [item["caption"] for item in dataset] == [text.replace("{}", "old *") for text in STYLE[:3]]
    first = dataset[0]["image"]
    assert all(np.array_equal(dataset[0]["image"], first) for _ in range(8))


def test_crop_or_squeeze(folder):
    cropped = PersonalizedBase(str(folder), size=24, center_crop=True, flip_p=0.0)[0]["image"]
    assert (cropped[:, :12, 0] == 1).all() and (cropped[:, 12:, 0] == -1).all()
    squeezed = PersonalizedBase(str(folder), size=24, interpolation="box", flip_p=0.0)[0]["image"]
    assert (squeezed[:, 6:12, 0] == 1).all() and (squeezed[:, :6, 0] == -1).all() and (squeezed[:, 12:, 0] == -1).all()


def test_images_are_mirrored_with_the_probability(folder):
    dataset = PersonalizedBase(str(folder), size=24, center_crop=True, flip_p=0.5)
    torch.manual_seed(0)
    mirrored = [dataset[0]["image"][0, 0, 0] == -1 for _ in range(40)]
    assert 10 < sum(mirrored) < 30
    always = PersonalizedBase(str(folder), size=24, center_crop=True, flip_p=1.0)[0]["image"]
    assert (always[:, 12:, 0] == 1).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"templates": "objects"}, 'there are no templates "objects" (did you mean "object"'),
        ({"templates": ["a photo"]}, "templates must be a list of texts with {}"),
        ({"templates": []}, "templates must be a list of texts with {}"),
        ({"repeats": 0}, "size and repeats must be at least 1 and flip_p between 0 and 1, not 512, 0 and 0.5"),
        ({"flip_p": 2.0}, "size and repeats must be at least 1"),
        ({"per_image_tokens": True}, "per_image_tokens is not implemented; leave it out"),
        ({"interpolation": "cubic"}, 'there is no interpolation "cubic"'),
        ({"data_root": "nowhere"}, 'there is no folder "nowhere"'),
    ],
    ids=str,
)
def test_invalid_parameters_raise_user_error(params, message, folder):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        PersonalizedBase(**{"data_root": str(folder), **params})
    assert "\n" not in str(error.value)


def test_masked_images_have_the_form_of_stable_diffusion(folder):
    inner = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"data_root": str(folder), "size": 32}}
    inner["params"] |= {"flip_p": 0.0, "repeats": 2}
    dataset, other = MaskedImages(inner, fixed=True), MaskedPictures(inner, fixed=True)
    assert len(dataset) == 6
    for item, same in zip(dataset, other, strict=True):
        assert set(item) == {"image", "mask", "masked_image", "caption", "file_path_", "relative_file_path_"}
        assert item["mask"].shape == (32, 32, 1) and item["mask"].dtype == np.float32
        assert set(np.unique(item["mask"])) == {0.0, 1.0} and np.array_equal(item["mask"] * 2 - 1, same["mask"])
        inside = item["mask"][..., 0] == 1
        assert (item["masked_image"][inside] == 0).all()
        assert np.array_equal(item["masked_image"][~inside], item["image"][~inside])
        assert item["masked_image"].dtype == np.float32


def test_masks_of_the_data_set(folder):
    for index in range(3):
        mask = np.zeros((24, 48), np.uint8)
        mask[:, 12:20] = 255
        Image.fromarray(mask).save(folder / f"{index}_mask.png")
    params = {"data_root": str(folder), "size": 24, "beside": {"mask": "{stem}_mask.png"}}
    params |= {"crop": "center", "flip_p": 0.0}
    inner = {"target": "ldm.data.folder.FolderTrain", "params": params}
    item = MaskedImages(inner, masks="own")[0]
    expected = np.zeros((24, 24, 1), np.float32)
    expected[:, :8] = 1
    assert np.array_equal(item["mask"], expected)
    assert np.array_equal(item["masked_image"], item["image"] * (1 - expected))
    with pytest.raises(UserError, match="the items of PersonalizedBase have no mask"):
        MaskedImages(
            {"target": "ldm.data.personalized.PersonalizedBase", "params": {"data_root": str(folder)}}, masks="own"
        )[0]
    with pytest.raises(UserError, match="round"):
        MaskedImages(inner, masks="round")
