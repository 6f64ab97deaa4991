"""Places365 in miniature: published folders and lists, classes and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image
from torch.utils.data import default_collate

from ldm.config.instantiate import instantiate_from_config
from ldm.data.inpainting import masked
from ldm.data.masks import find_masks
from ldm.data.places import PlacesTrain, PlacesValidation, class_name
from ldm.errors import UserError

TRAIN = {"a/abbey/00000001.jpg": 1, "a/apartment_building/outdoor/00000001.jpg": 8, "a/abbey/00000002.jpg": 1}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Create the published folder with small images of 256 pixels in miniature, 24 × 36."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data/places365"
    for seed, name in enumerate(TRAIN):
        write(root / "data_256" / name, seed=seed)
    for number in (1, 2):
        write(root / f"val_256/Places365_val_0000000{number}.jpg", seed=10 + number)
    (root / "places365_train_standard.txt").write_text("".join(f"/{name} {label}\n" for name, label in TRAIN.items()))
    (root / "places365_val.txt").write_text("Places365_val_00000002.jpg 8\nPlaces365_val_00000001.jpg 1\n")
    (root / "categories_places365.txt").write_text("/a/abbey 1\n/a/apartment_building/outdoor 8\n")
    return root


def decoded(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_published_layout_has_classes_and_masks(root):
    config = {"target": "ldm.data.places.PlacesTrain", "params": {"size": 24}}
    dataset = instantiate_from_config(config)
    assert [dataset.entries(i)["relative_file_path_"] for i in range(len(dataset))] == list(TRAIN)
    assert [dataset.entries(i)["class_label"] for i in range(3)] == [1, 8, 1]
    assert [dataset.entries(i)["human_label"] for i in range(3)] == ["abbey", "apartment building/outdoor", "abbey"]
    item = dataset[1]
    assert item["image"].shape == (24, 24, 3) and item["mask"].shape == (24, 24, 1)
    assert np.array_equal(item["masked_image"], masked(item["image"], item["mask"]))
    assert item["file_path_"] == f"data/places365/data_256/{list(TRAIN)[1]}"
    batch = default_collate([dataset[0], dataset[1]])
    assert batch["class_label"].tolist() == [1, 8] and batch["mask"].shape == (2, 24, 24, 1)


def test_validation_crop_and_mask_are_fixed(root):
    dataset = PlacesValidation(size=24, masks="medium")
    item = dataset[0]
    whole = values(decoded(root / "val_256/Places365_val_00000002.jpg"))
    assert np.array_equal(item["image"], whole[:, 6:30]) and item["human_label"] == "apartment building/outdoor"
    assert np.array_equal(item["mask"], find_masks("medium")(24, 24, np.random.default_rng(0)))
    assert np.array_equal(dataset[0]["mask"], item["mask"]) and not np.array_equal(dataset[1]["mask"], item["mask"])


def test_training_crops_and_masks_are_random(root):
    dataset, whole = PlacesTrain(size=24, crop_size=16), values(decoded(root / "data_256" / next(iter(TRAIN))))
    torch.manual_seed(0)
    items = [dataset[0] for _ in range(20)]
    assert len({item["mask"].tobytes() for item in items}) == 20
    crops = {whole[y : y + 16, x : x + 16].tobytes() for y in range(9) for x in range(21)}
    found = {item["image"].tobytes() for item in items}
    assert len(found) > 10 and found <= crops


@pytest.mark.parametrize(("folder", "split"), [("data_large_standard", PlacesTrain), ("val_large", PlacesValidation)])
def test_other_published_folders_are_found(tmp_path, folder, split):
    write(tmp_path / folder / "a/abbey/1.jpg", height=64, width=96)
    dataset = split(size=16, data_root=str(tmp_path))
    item = dataset[0]
    assert item["image"].shape == (16, 16, 3) and "class_label" not in item and "mask" in item


def test_any_folder_of_images_serves(tmp_path):
    write(tmp_path / "x/y.png")
    (tmp_path / "list.txt").write_text("x/y.png\n")
    for txt_file in (None, str(tmp_path / "list.txt")):
        item = PlacesTrain(size=8, masks=None, data_root=str(tmp_path), txt_file=txt_file)[0]
        assert set(item) == {"image", "relative_file_path_", "file_path_"} and item["relative_file_path_"] == "x/y.png"
    chosen = PlacesValidation(size=8, data_root=str(tmp_path), keys=["image", "mask"])
    assert set(chosen[0]) == {"image", "mask"}


def test_names_of_classes_come_from_folders_without_the_list(root):
    (root / "categories_places365.txt").unlink()
    assert PlacesTrain(size=8)[1]["human_label"] == "apartment building/outdoor"
    assert PlacesValidation(size=8)[0]["human_label"] == "8"
    assert class_name("/a/airfield") == "airfield" and class_name("x_y") == "x y"


def test_unreadable_image_is_replaced(root, caplog):
    (root / "data_256" / next(iter(TRAIN))).write_bytes(b"no image")
    dataset = PlacesTrain(size=8)
    assert dataset[0]["class_label"] == 8 and caplog.text.count("00000001.jpg") == 1
    with pytest.raises(UserError, match="PlacesTrain: 1 of 3 images cannot be read"):
        PlacesTrain(size=8).check_files()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"masks": "wide"}, 'there are no masks "wide"'),
        ({"crop_size": 512}, "crop_size 512 is larger than size 256"),
        ({"data_root": "none"}, 'there is no folder "none"'),
        ({"txt_file": "none.txt"}, 'there is no list "none.txt"'),
        ({"txt_file": "some.txt"}, r'some.txt" has no class for image 2, "b.jpg"; complete the line'),
        ({"txt_file": "empty.txt"}, 'empty.txt" contains no image'),
    ],
)
def test_invalid_parameters_raise_user_error(root, tmp_path, params, message):
    (tmp_path / "some.txt").write_text("a.jpg 3\nb.jpg\n")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match=message) as raised:
        PlacesTrain(**params)
    assert "\n" not in str(raised.value)
