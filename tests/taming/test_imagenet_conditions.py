"""Published data sets of ImageNet with conditions of the size of the image: low resolution, edges and depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images_on_disk import values, write
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from taming.data import imagenet
from taming.data.helper_types import Annotation
from taming.data.utils import custom_collate

SYNSETS = ["n01440764", "n01443537"]


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    """Create both splits in a temporary cache, with one image of 24 × 36 for each synset; return their pixels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        data = tmp_path / "cache/autoencoders/data" / f"ILSVRC2012_{split}" / "data"
        pixels = [write(data / synset / "1.png", seed=seed) for seed, synset in enumerate(SYNSETS)]
    return pixels


def write_depth(path, depth: np.ndarray) -> None:
    """Write a depth map in the published form: the bytes of float32 as the channels of a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(depth, np.float32).view(np.uint8).reshape(*depth.shape, 4)).save(path)


def test_low_resolution_has_the_size_of_the_image(arrays):
    config = {"target": "taming.data.imagenet.ImageNetScaleValidation", "params": {"crop_size": 16, "up_factor": 4}}
    item = instantiate_from_config(config)[1]
    assert np.array_equal(item["image"], values(arrays[1])[4:20, 10:26]) and item["class_label"] == 1
    small = Image.fromarray(arrays[1]).resize((9, 6), Image.Resampling.BICUBIC)
    expected = np.asarray(small.resize((36, 24), Image.Resampling.BICUBIC))[4:20, 10:26]
    assert np.array_equal(item["lr"], values(expected))
    assert "lr" not in imagenet.ImageNetScaleValidation(size=16)[0]


def test_images_are_reduced_and_enlarged(arrays):
    whole = imagenet.ImageNetScaleValidation(hr_factor=2)[0]["image"]
    assert np.array_equal(whole, values(np.asarray(Image.fromarray(arrays[0]).resize((18, 12), Image.BICUBIC))))
    assert imagenet.ImageNetScaleValidation(crop_size=32, up_factor=2)[0]["lr"].shape == (32, 32, 3)
    with pytest.raises(UserError, match="36 × 24 pixels cannot be reduced by 30"):
        imagenet.ImageNetScaleValidation(hr_factor=30)[0]
    with pytest.raises(UserError, match='did you mean "bicubic"'):
        imagenet.ImageNetScaleTrain(keep_mode="bicubc")


def test_training_crops_both_alike(arrays):
    dataset = imagenet.ImageNetScaleTrain(crop_size=16, up_factor=1)
    torch.manual_seed(0)
    items = [dataset[0] for _ in range(20)]
    assert all(np.array_equal(item["lr"], item["image"]) for item in items)
    assert len({item["image"].tobytes() for item in items}) > 10


def test_edges_follow_the_border_of_a_square(arrays, tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = 255
    Image.fromarray(pixels).save(tmp_path / "cache/autoencoders/data/ILSVRC2012_validation/data/n01440764/1.png")
    item = imagenet.ImageNetEdgesValidation(crop_size=64)[0]
    assert item["lr"].shape == (64, 64, 3) and set(np.unique(item["lr"])) == {0, 1}
    rows, columns = np.nonzero(item["lr"][..., 0])
    distance = np.maximum(abs(rows - 31.5), abs(columns - 31.5))
    assert len(rows) > 100 and abs(distance - 16).max() <= 2.5


def test_depth_maps_are_cropped_and_mirrored_with_the_image(arrays, tmp_path):
    depth = np.arange(24 * 36, dtype=np.float32).reshape(24, 36) / 7 + 3
    for split in ("train", "val"):
        write_depth(tmp_path / f"data/imagenet_depth/{split}/n01440764/1.png", depth)
    normalised = 2 * (depth - depth.min()) / (depth.max() - depth.min()) - 1
    item = imagenet.ImageNetValidationWithDepth(size=24)[0]
    assert np.array_equal(item["image"], values(arrays[0])[:, 6:30])
    np.testing.assert_allclose(item["depth"], normalised[:, 6:30], atol=1e-6)
    torch.manual_seed(0)
    train, whole, mirrored = imagenet.ImageNetTrainWithDepth(size=24), values(arrays[0]), 0
    for _ in range(20):
        item = train[0]
        left = round(float(item["depth"][0].min() + 1) / 2 * (24 * 36 - 1))
        is_mirrored = item["depth"][0, 0] > item["depth"][0, -1]
        mirrored += is_mirrored
        crop = whole[:, left : left + 24]
        assert np.abs(item["image"] - (crop[:, ::-1] if is_mirrored else crop)).max() < 1e-6
    assert 3 < mirrored < 17


def test_small_images_are_enlarged_with_their_depth(arrays, tmp_path):
    write_depth(tmp_path / "depth/val/n01440764/1.png", np.linspace(0, 1, 24 * 36).reshape(24, 36))
    dataset = imagenet.ImageNetValidationWithDepth(crop_size=32, root="depth")
    item = dataset[0]
    assert item["image"].shape == (32, 32, 3) and item["depth"].shape == (32, 32)


def test_restricted_classes_are_selected(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/imagenet_depth").mkdir(parents=True)
    root = tmp_path / "autoencoders/data/ILSVRC2012_train"
    synsets = [f"n{number:08}" for number in range(1000)]
    for index in (29, 30, 397, 398):
        write(root / "data" / synsets[index] / "1.png")
    (root / "index_synset.yaml").write_text("".join(f"{i}: {synset}\n" for i, synset in enumerate(synsets)))
    dataset = imagenet.RINTrainWithDepth(size=8)
    assert dataset.base_dset.synsets == [synsets[30], synsets[397]]


def test_other_depth_maps_raise_user_error(arrays, tmp_path):
    with pytest.raises(UserError, match='ImageNetTrainWithDepth: there is no folder "data/imagenet_depth"'):
        imagenet.ImageNetTrainWithDepth(size=24)
    path = tmp_path / "data/imagenet_depth/val/n01440764/1.png"
    for depth, message in [
        (np.zeros((24, 30)), "has another size than"),
        (np.full((24, 36), np.nan), "has values that are not finite"),
        (None, "has the mode L, not RGBA"),
    ]:
        if depth is None:
            Image.new("L", (36, 24)).save(path)
        else:
            write_depth(path, depth)
        with pytest.raises(UserError, match=message) as raised:
            imagenet.ImageNetValidationWithDepth(size=24)[0]
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="a depth map has four channels"):
        imagenet.rgba_to_depth(np.zeros((4, 4, 3), np.uint8))


def test_published_examples_are_squares_of_256(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data/drin_images/n1/a.JPEG", height=64, width=96)
    write_depth(tmp_path / "data/drin_depth/n1/a.png", np.linspace(0, 1, 64 * 96).reshape(64, 96))
    (tmp_path / "data/drin_examples.txt").write_text("n1/a.JPEG\n")
    dataset = imagenet.DRINExamples()
    item = dataset[0]
    assert item["image"].shape == (256, 256, 3) and item["depth"].shape == (256, 256) and len(dataset) == 1
    assert item["image"].dtype == np.float32 and abs(item["depth"]).max() <= 1


def test_lists_of_annotations_are_not_collated():
    boxes = [Annotation(0.1, "a", (0, 0, 1, 1), 3, "x"), Annotation(0.2, "a", (0, 0, 1, 1), 4, "y")]
    batch = custom_collate([{"n": 1, "boxes": boxes}, {"n": 2, "boxes": boxes[:1]}, {"n": 3, "boxes": []}])
    assert batch["n"].tolist() == [1, 2, 3] and batch["boxes"] == [boxes, boxes[:1], []]
    assert custom_collate([torch.zeros(2), torch.ones(2)]).shape == (2, 2)
