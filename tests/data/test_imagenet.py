"""ImageNet in a folder: classes, names, crops, and the default folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from torch.utils.data import default_collate

from ldm.data.imagenet import (
    ImageNetSRTrain,
    ImageNetSRValidation,
    ImageNetTrain,
    ImageNetValidation,
    parse_indices,
)
from ldm.errors import UserError

SYNSETS = ["n01440764", "n01443537", "n02084071", "n03000001"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Create the published folders in a temporary cache; return the folder of the last split."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for split in ("train", "validation"):
        data = tmp_path / "autoencoders" / "data" / f"ILSVRC2012_{split}" / "data"
        for number, synset in enumerate(SYNSETS):
            write(data / synset / f"{synset}_{number}.png", seed=number)
    write(data / "n01440764" / "n01440764_9.png", seed=9)
    write(data / "other" / "x.png")
    names = "n01440764 tench, Tinca tinca\nn01443537 goldfish\n"
    (data.parent / "synset_human.txt").write_text(names)
    return data


def test_items_have_published_entries(cache):
    dataset = ImageNetValidation(config={"size": 24})
    assert len(dataset) == 5
    item = dataset[1]
    array = write(cache / "again.png", seed=9)
    assert np.array_equal(item.pop("image"), values(array[:, 6:30]))
    assert item == {
        "file_path_": str(cache / "n01440764" / "n01440764_9.png"),
        "relpath": "n01440764/n01440764_9.png",
        "synsets": "n01440764",
        "class_label": 0,
        "human_label": "tench, Tinca tinca",
    }
    assert [dataset.entries(i)["class_label"] for i in range(5)] == [0, 0, 1, 2, 3]
    assert dataset.entries(4)["human_label"] == "n03000001", "without a name the label is the synset"
    batch = default_collate([dataset[i] for i in range(3)])
    assert batch["class_label"].tolist() == [0, 0, 1] and batch["image"].shape == (3, 24, 24, 3)


def test_images_outside_the_folders_of_synsets_are_counted(cache, caplog):
    caplog.set_level("INFO", "ldm")
    ImageNetValidation(config={"size": 24})
    assert caplog.messages == [f'passed over 1 file in "{cache}" besides the images of synsets: other/x.png']


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_of_synsets_are_read_in_every_encoding(cache, encoding):
    text = "n01440764 tench\u2028Tinca\r\nn01443537 gold\x85fish\n"
    (cache.parent / "synset_human.txt").write_bytes(text.encode(encoding))
    dataset = ImageNetValidation(config={"size": 24})
    labels = [dataset.entries(index)["human_label"] for index in (0, 2)]
    assert labels == ["tench\u2028Tinca", "gold\x85fish"]


def test_training_crops_are_random_and_validation_crops_are_central(cache):
    train, validation = ImageNetTrain(config={"size": 24}), ImageNetValidation(config={"size": 24})
    torch.manual_seed(0)
    assert len({train[0]["image"].tobytes() for _ in range(20)}) > 5
    assert len({validation[0]["image"].tobytes() for _ in range(20)}) == 1
    assert len({ImageNetTrain(config={"size": 24, "random_crop": False})[0]["image"].tobytes() for _ in range(20)}) == 1
    assert validation[0]["image"].shape == (24, 24, 3) and ImageNetTrain()[0]["image"].shape == (24, 36, 3)


def test_sub_indices_select_classes(cache):
    subset = ImageNetTrain(config={"sub_indices": "1, 3"})
    assert [subset.entries(i)["synsets"] for i in range(len(subset))] == ["n01443537", "n03000001"]
    assert [subset.entries(i)["class_label"] for i in range(len(subset))] == [0, 1]
    original = ImageNetTrain(config={"sub_indices": "1, 3", "keep_orig_class_label": True})
    assert [original.entries(i)["class_label"] for i in range(len(original))] == [1, 3]


def test_parse_indices_accepts_numbers_and_ranges():
    assert parse_indices("0-2, 7,5 - 6", 8) == [0, 1, 2, 5, 6, 7]
    for text in ("8", "a", "3-", ""):
        with pytest.raises(UserError, match="must be indices and ranges below 8"):
            parse_indices(text, 8)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_data_root_can_be_either_folder_level(depth, cache):
    root = [cache, cache.parent.parent, cache.parents[2]][depth]
    if depth == 2:
        with pytest.raises(UserError, match=f'no synset folders such as n01440764 in "{root}"'):
            ImageNetValidation(data_root=str(root))
    else:
        dataset = ImageNetValidation(data_root=str(root))
        assert dataset.entries(0)["file_path_"] == str(cache / "n01440764" / "n01440764_0.png")


def test_missing_images_raise_user_error_with_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"ILSVRC2012_train/data.; unpack ImageNet there, or set data_root") as raised:
        ImageNetTrain(config={"size": 256})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="ILSVRC2012_validation"):
        ImageNetSRValidation(size=256, degradation="pil_nearest")
    (tmp_path / "n00000001").mkdir()
    with pytest.raises(UserError, match="contain no images"):
        ImageNetTrain(data_root=str(tmp_path))


def test_unknown_config_key_raises_user_error(cache):
    with pytest.raises(UserError, match='config has no "sise" \\(did you mean "size"'):
        ImageNetTrain(config={"sise": 256})


def test_super_resolution_pairs_have_class_labels(cache):
    item = ImageNetSRTrain(size=16, degradation="cv_area", downscale_f=4, min_crop_f=1.0, random_crop=False)[3]
    assert (item["class_label"], item["synsets"]) == (3, "n03000001")
    assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)
    labels = ImageNetTrain(process_images=False)[3]
    assert {key: value for key, value in item.items() if key in labels} == labels
    assert "image" not in labels


def test_parameters_by_position_are_the_published_ones(cache):
    assert "image" not in ImageNetValidation(False, str(cache))[0]
    dataset = ImageNetValidation(config={"size": 24})
    assert dataset.class_labels == [0, 0, 1, 2, 3] and dataset.synset2idx["n03000001"] == 3
    assert dataset.abspaths[4] == str(cache / dataset.relpaths[4]) and dataset.config == {"size": 24}


def test_subclass_chooses_the_images_of_super_resolution(cache):
    class Client(ImageNetSRTrain):
        def get_base(self):
            return torch.utils.data.Subset(super().get_base(), [2])

    dataset = Client(size=16, degradation="cv_area", min_crop_f=1.0, random_crop=False)
    whole = ImageNetSRTrain(size=16, degradation="cv_area", min_crop_f=1.0, random_crop=False)
    assert len(dataset) == 1 and dataset[0]["synsets"] == whole[2]["synsets"] == "n02084071"
    assert np.array_equal(dataset[0]["LR_image"], whole[2]["LR_image"])
