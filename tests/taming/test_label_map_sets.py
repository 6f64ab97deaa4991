"""Published data sets of images with label maps: landscapes from Flickr, and ADE20K."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from taming.data import ade20k, sflckr


def write_map(path, top: int, bottom: int, height: int = 24, width: int = 36) -> None:
    """Write a label map with one label above and one below the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.full((height, width), top, np.uint8)
    labels[height // 2 :] = bottom
    Image.fromarray(labels).save(path)


@pytest.fixture
def flickr(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a/one.jpg", "two.jpg")):
        write(tmp_path / "data/sflckr_images" / name, seed=seed)
        write_map(tmp_path / "data/sflckr_segmentations" / name.replace(".jpg", ".png"), 3, 181)
    (tmp_path / "data/sflckr_examples.txt").write_text("two.jpg\na/one.jpg\n")
    return tmp_path / "data"


def test_published_examples_have_one_hot_maps(flickr):
    dataset = instantiate_from_config({"target": "taming.data.sflckr.Examples", "params": {"size": 24}})
    item = dataset[1]
    assert item["relative_file_path_"] == "a/one.jpg" and item["file_path_"] == "data/sflckr_images/a/one.jpg"
    assert item["segmentation_path_"] == "data/sflckr_segmentations/a/one.png"
    pixels = np.asarray(Image.open(flickr / "sflckr_images/a/one.jpg"))
    assert np.array_equal(item["image"], values(pixels[:, 6:30]))
    assert item["segmentation"].shape == (24, 24, 182) and item["segmentation"].sum() == 24 * 24
    assert item["segmentation"][:12, :, 3].all() and item["segmentation"][12:, :, 181].all()
    whole = sflckr.Examples()[0]
    assert whole["image"].shape == (24, 36, 3) and whole["segmentation"].shape == (24, 36, 182)


def test_labels_are_shifted(flickr):
    folders = [str(flickr / name) for name in ("sflckr_examples.txt", "sflckr_images", "sflckr_segmentations")]
    write_map(flickr / "sflckr_segmentations/two.png", 255, 0)
    item = sflckr.SegmentationBase(*folders, size=24, n_labels=183, shift_segmentation=True)[0]
    assert item["segmentation"][:12, :, 0].all() and item["segmentation"][12:, :, 1].all()


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "area", "lanczos"])
def test_published_interpolations_are_known(flickr, interpolation):
    assert sflckr.Examples(size=8, interpolation=interpolation)[0]["image"].shape == (8, 8, 3)


def test_images_without_maps_are_left_out(flickr, caplog):
    (flickr / "sflckr_segmentations/two.png").unlink()
    assert len(sflckr.Examples(size=8)) == 1 and caplog.text.count("two.jpg") == 1
    (flickr / "sflckr_examples.txt").unlink()
    with pytest.raises(UserError, match=r'Examples: there is no list "data/sflckr_examples.txt"'):
        sflckr.Examples(size=8)


@pytest.fixture
def ade(tmp_path, monkeypatch):
    """Create the folders of ADEChallengeData2016 in miniature."""
    monkeypatch.chdir(tmp_path)
    root, lines = tmp_path / "data/ade20k_root", []
    for split, short, numbers in (("training", "train", (1, 2)), ("validation", "val", (1,))):
        for number in numbers:
            name = f"ADE_{short}_{number:08}"
            write(root / f"images/{split}/{name}.jpg", seed=number)
            write_map(root / f"annotations/{split}/{name}.png", 0, 150)
            lines.append(f"{name} scene_{short}_{number}\n")
    (root / "sceneCategories.txt").write_text("".join(lines))
    (tmp_path / "data/ade20k_train.txt").write_text("training/ADE_train_00000002.jpg\n")
    return root


def test_ade20k_has_scenes_and_151_labels(ade):
    item = instantiate_from_config({"target": "taming.data.ade20k.ADE20kTrain", "params": {"size": 24}})[0]
    assert item["scene_category"] == "scene_train_2" and item["segmentation"].shape == (24, 24, 151)
    assert item["segmentation"][:12, :, 0].all() and item["segmentation"][12:, :, 150].all()
    assert item["relative_segmentation_path_"] == "training/ADE_train_00000002.png"
    validation = ade20k.ADE20kValidation(size=24, crop_size=16)
    assert (len(validation), validation.split, validation.n_labels) == (1, "validation", 151)
    item = validation[0]
    pixels = np.asarray(Image.open(ade / "images/validation/ADE_val_00000001.jpg"))
    assert np.array_equal(item["image"], values(pixels[4:20, 10:26])) and item["scene_category"] == "scene_val_1"


def test_ade20k_is_read_from_any_place_without_lists(ade, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    dataset = ade20k.ADE20kTrain(size=16, data_root=str(ade))
    assert [dataset.entries(i)["scene_category"] for i in range(len(dataset))] == ["scene_train_1", "scene_train_2"]
    torch.manual_seed(0)
    assert len({dataset[0]["image"].tobytes() for _ in range(20)}) > 3, "training crops are random"


def test_ade20k_names_what_is_missing(ade, tmp_path):
    (ade / "sceneCategories.txt").write_text("ADE_train_00000001\n")
    with pytest.raises(UserError, match=r'sceneCategories.txt", line 1, must be such as "ADE_train_00000001 airport'):
        ade20k.ADE20kTrain(size=16)
    (ade / "sceneCategories.txt").unlink()
    with pytest.raises(UserError, match="there is no list of scenes"):
        ade20k.ADE20kTrain(size=16)
    with pytest.raises(UserError, match='ADE20kTrain: there is no folder "none"'):
        ade20k.ADE20kTrain(size=16, data_root="none")
