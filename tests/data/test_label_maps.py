"""Images with label maps: landscapes with the labels of COCO-Stuff."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from annotated_sets import write_label_map, write_landscapes, write_photo
from omegaconf import OmegaConf
from PIL import Image

from ldm.config.instantiate import instantiate_from_config
from ldm.data.coco_stuff import DETECTION_CLASSES, LABELS, STUFF, THINGS, UNUSED_THINGS
from ldm.data.landscapes import RFWTrain, RFWValidation
from ldm.errors import UserError
from ldm.io.label_maps import read_palette
from ldm.io.layouts import read_labels

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Write both splits into the default folder, which is returned; the working folder is above it."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        write_landscapes(tmp_path / "data/landscapes", split)
    return tmp_path / "data/landscapes"


def test_maps_have_one_channel_a_label(root):
    item = RFWValidation()[0]
    segmentation = item["segmentation"]
    assert segmentation.shape == (24, 36, 182) and item["image"].shape == (24, 36, 3)
    assert not segmentation[:4, :4].any(), "255 means no label"
    assert segmentation[:12, 4:, 156].all() and segmentation[12:, :, 154].all() and segmentation.sum() == 24 * 36 - 16
    assert item["relative_file_path_"] == "0.jpg" and item["segmentation_path_"].endswith("segmentations/0.png")


def test_published_configuration(root):
    config = OmegaConf.load(ROOT / "models/ldm/semantic_synthesis512/config.yaml").data.params
    train, validation = (instantiate_from_config(config[split]) for split in ("train", "validation"))
    for dataset in (train, validation):
        item = dataset[0]
        assert item["image"].shape == (512, 512, 3) and item["segmentation"].shape == (512, 512, 182)
        assert item["segmentation"].dtype == np.float32
    first = validation[0]["segmentation"]
    assert np.array_equal(first, validation[0]["segmentation"])
    assert (train.random_crop, train.flip_p, validation.random_crop, validation.flip_p) == (True, 0.5, False, 0.0)


def test_maps_of_8_bits_need_a_quarter_of_the_memory(root):
    floats, integers = (RFWValidation(16, segmentation_to_float32=flag)[0]["segmentation"] for flag in (True, False))
    assert floats.dtype == np.float32 and integers.dtype == np.uint8
    assert np.array_equal(floats, integers)


def test_image_and_map_are_cropped_and_mirrored_alike(root):
    """Check that the map of a random view labels the white part of the image."""
    array = np.zeros((64, 96, 3), np.uint8)
    array[16:40, 50:80] = 255
    Image.fromarray(array).save(root / "train/images/0.png")
    write_label_map(root / "train/segmentations/0.png", array[..., 0] // 255 * 21)
    (root / "train/images/0.jpg").unlink()
    dataset = RFWTrain(size=48, crop_size=32)
    torch.manual_seed(0)
    views = set()
    for _ in range(30):
        item = dataset[0]
        white = item["segmentation"][..., 21] == 1
        edge = np.zeros_like(white)
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                edge |= np.roll(white, step, axis) != white
        assert (item["image"][white & ~edge] > 0.9).all() and (item["image"][~white & ~edge] < -0.9).all()
        assert (item["segmentation"].sum(axis=-1) == 1).all(), "labels are not interpolated"
        views.add(item["image"].tobytes())
    assert len(views) > 10


def test_shifted_labels(root):
    segmentation = RFWValidation(n_labels=183, shift_segmentation=True)[0]["segmentation"]
    assert segmentation.shape == (24, 36, 183) and (segmentation.sum(axis=-1) == 1).all()
    assert segmentation[:4, :4, 0].all() and segmentation[:12, 4:, 157].all()


def test_palette_images_hold_labels_and_colour_images_need_a_palette(root):
    labels = np.full((24, 36), 156)
    write_label_map(root / "validation/segmentations/0.png", labels, palette=True)
    assert RFWValidation(16)[0]["segmentation"][..., 156].all()
    colours = root / "colours.txt"
    colours.write_text("#87ceeb 156 sky\n#2a5f9e 154 sea\n")
    array = np.zeros((24, 36, 3), np.uint8)
    array[:12], array[12:] = (0x87, 0xCE, 0xEB), (0x2A, 0x5F, 0x9E)
    for number in range(2):
        Image.fromarray(array).save(root / f"validation/segmentations/{number}.png")
    segmentation = RFWValidation(palette=str(colours))[0]["segmentation"]
    assert segmentation[:12, :, 156].all() and segmentation[12:, :, 154].all()
    with pytest.raises(UserError, match=r"no image can be read .*is a colour image"):
        RFWValidation()[0]


def test_labels_out_of_range_are_named_once(root, caplog):
    labels = np.full((24, 36), 156)
    labels[:2] = 200
    for number in range(2):
        write_label_map(root / f"validation/segmentations/{number}.png", labels)
    dataset = RFWValidation()
    for index in (0, 1, 0):
        assert not dataset[index]["segmentation"][:2].any()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "validation/segmentations/0.png" in line
    assert "has 72 pixels with labels such as 200, but there are 182 labels; they count as no label" in line


def test_images_without_maps_are_counted(root, caplog):
    write_photo(root / "train/images/alone.jpg")
    (root / "list.txt").write_text("0.jpg\nalone.jpg\nnone.jpg\n1.jpg\n")
    assert len(RFWTrain(16)) == 2
    assert len(RFWTrain(16, txt_file=str(root / "list.txt"))) == 2
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith('train/images": left out images without a label map: 1 (alone.jpg)')
    assert second.endswith(
        'list.txt": left out images without a label map: 1 (alone.jpg); images that are missing: 1 (none.jpg)'
    )


def test_unreadable_maps_are_found_before_training(root, caplog):
    (root / "train/segmentations/1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match="RFWTrain, label maps: 1 of 2 images cannot be read") as raised:
        RFWTrain(16).check_files()
    assert "\n" not in str(raised.value)
    dataset = RFWTrain(16)
    dataset.max_unreadable = 0.5
    dataset.check_files()
    caplog.clear()
    assert dataset[1]["relative_file_path_"] == "0.jpg"
    assert not [record for record in caplog.records if "1.png" in record.getMessage()], "it was named before"


def test_map_of_other_proportions_is_named(root, caplog):
    write_label_map(root / "train/segmentations/1.png", np.zeros((36, 36)))
    assert RFWTrain(16)[1]["relative_file_path_"] == "0.jpg"
    assert 'segmentations/1.png" (36 × 36 pixels) has other proportions than its image (36 × 24)' in caplog.text


def test_maps_of_another_resolution_are_resized(root):
    write_label_map(root / "validation/segmentations/0.png", np.full((48, 72), 9))
    assert RFWValidation()[0]["segmentation"][..., 9].all()
    assert RFWValidation(16)[0]["segmentation"][..., 9].all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"data_root": "none"}, 'there is no folder "none"'),
        ({"segmentation_root": "none"}, 'there is no folder "none"'),
        ({"data_root": "data/landscapes"}, 'there is no folder ".*segmentations"; put the maps there'),
        ({"txt_file": "none.txt"}, 'there is no list "none.txt"'),
        ({"size": 16, "crop_size": 20}, "crop_size is 20, but size is 16"),
        ({"interpolation": "bicubik"}, 'no interpolation "bicubik"'),
        ({"segmentation_root": "data/landscapes"}, "has no image with a label map .*images without a label map: 2"),
    ],
    ids=str,
)
def test_invalid_parameters_raise_user_error(params, message, root):
    with pytest.raises(UserError, match=message) as raised:
        RFWTrain(**params)
    assert "\n" not in str(raised.value)


def test_labels_of_coco_stuff():
    assert (len(THINGS), len(STUFF), len(LABELS), len(DETECTION_CLASSES)) == (91, 91, 182, 80)
    assert (LABELS[0], LABELS[90], LABELS[91], LABELS[181]) == ("person", "hair brush", "banner", "wood")
    assert len(set(LABELS)) == 182 and len(UNUSED_THINGS) == 11


def test_labels_agree_with_the_bundled_files():
    examples = ROOT / "data/semantic_examples"
    assert tuple(read_labels(examples / "labels.txt")) == LABELS
    palette = read_palette(examples / "colours.txt")
    named = [line.split(maxsplit=2) for line in (examples / "colours.txt").read_text().splitlines()]
    assert [LABELS[palette[colour]] for colour, _, _ in named] == [name for _, _, name in named]
