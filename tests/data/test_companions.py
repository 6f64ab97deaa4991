"""Masks, label maps, boxes and images of lower resolution beside the images of a folder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from images_on_disk import pixels, values, write
from PIL import Image

from ldm.data.companions import expand
from ldm.data.folder import FolderTrain, FolderValidation
from ldm.errors import UserError


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    """Leave informative log lines out, also after a test that asked for them."""
    caplog.set_level("WARNING", "ldm")


def names(dataset):
    return dataset.labels["relative_file_path_"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{stem}_mask.png", "b/c/x_mask.png"),
        ("maps/{stem}.png", "b/c/maps/x.png"),
        ("../maps/{name}.png", "b/maps/x.jpg.png"),
        ("maps/{path}.png", "maps/b/c/x.png"),
        ("{folder}_maps/{stem}.png", "b/c_maps/x.png"),
        ("../maps/{path}.png", "../maps/b/c/x.png"),
    ],
)
def test_patterns_start_from_the_image_or_from_the_root(pattern, expected):
    assert expand(pattern, "b/c/x.jpg") == expected


@pytest.fixture
def masked(tmp_path):
    """Return a folder with two images and their masks of half the resolution."""
    for number, name in enumerate(("a", "b")):
        write(tmp_path / f"{name}.png", height=16, width=24, seed=number)
        mask = np.zeros((8, 12), np.uint8)
        mask[2:4, 3:6] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
    return tmp_path


def test_masks_beside_images_are_entries_and_no_images(masked):
    dataset = FolderValidation(str(masked), size=16, beside={"mask": "{stem}_mask.png"})
    assert names(dataset) == ["a.png", "b.png"]
    item = dataset[0]
    expected = np.full((16, 16, 1), -1, np.float32)
    expected[4:8, 2:8] = 1  # the crop begins at the column 4
    assert item["mask"].dtype == np.float32 and np.array_equal(item["mask"], expected)
    image = values(pixels(16, 24, 0)[:, 4:20])
    assert np.array_equal(item["image"], image)
    assert np.array_equal(item["masked_image"], np.where(expected > 0, np.float32(-1), image))


def test_everything_beside_an_image_is_cropped_and_mirrored_with_it(tmp_path):
    array = np.zeros((8, 12, 3), np.uint8)
    array[...] = (np.arange(12) * 20)[None, :, None]
    Image.fromarray(array).save(tmp_path / "x.png")
    (tmp_path / "more").mkdir()
    Image.fromarray(array[..., 0] // 20).save(tmp_path / "more/x_map.png")
    Image.fromarray(array).save(tmp_path / "more/x_small.png")
    Image.fromarray(array).save(tmp_path / "more/x_mask.png")
    box = {"label": "thing", "box": [4 / 12, 0.0, 6 / 12, 1.0]}
    (tmp_path / "more/x.json").write_text(json.dumps({"boxes": [box]}))
    sources = {
        "segmentation": "more/{stem}_map.png",
        "LR_image": "more/{stem}_small.png",
        "mask": "more/{stem}_mask.png",
        "boxes": "more/{stem}.json",
    }
    dataset = FolderTrain(str(tmp_path), size=8, beside=sources, n_labels=12, downscale_f=1, max_boxes=1)
    assert names(dataset) == ["x.png"] and dataset.class_names == ["thing"]
    torch.manual_seed(0)
    for _ in range(20):
        item = dataset[0]
        columns = (item["image"][0, :, 0] * 127.5 + 127.5).round().astype(int) // 20
        assert item["segmentation"].shape == (8, 8, 12) and item["segmentation"].dtype == np.float32
        assert np.array_equal(item["segmentation"].argmax(-1), np.broadcast_to(columns, (8, 8)))
        assert np.array_equal(item["LR_image"], item["image"])
        assert np.array_equal(item["mask"][0, :, 0] > 0, columns * 20 >= 128)
        (corners,) = dataset.box_tokens.decode(item["coordinates_bbox"]).boxes
        left, right = (corners[0] * 8, (corners[0] + corners[2]) * 8)
        inside = [i for i in range(8) if left - 0.2 <= i and i + 1 <= right + 0.2]
        assert sorted(columns[inside]) == [4, 5]


def test_labels_beyond_n_labels_are_no_label_and_named_once(tmp_path, caplog):
    caplog.set_level("INFO", "ldm")
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png", height=4, width=4)
        Image.fromarray(np.array([[0, 1, 2, 255]] * 4, np.uint8)).save(tmp_path / f"{name}_map.png")
    dataset = FolderValidation(str(tmp_path), size=4, beside={"segmentation": "{stem}_map.png"}, n_labels=2)
    for item in dataset:
        assert item["segmentation"][0].tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    (message,) = caplog.messages
    assert "has the label 255, and n_labels is 2" in message


def test_palette_gives_the_labels_of_colours(tmp_path):
    write(tmp_path / "a.png", height=2, width=2)
    colours = np.array([[[255, 0, 0], [0, 0, 255]]] * 2, np.uint8)
    Image.fromarray(colours).save(tmp_path / "a_map.png")
    (tmp_path / "palette.txt").write_text("#ff0000 1 red\n#0000ff 0 blue\n")
    params = {"beside": {"segmentation": "{stem}_map.png"}, "n_labels": 2, "palette": str(tmp_path / "palette.txt")}
    item = FolderValidation(str(tmp_path), size=2, **params)[0]
    assert item["segmentation"].argmax(-1).tolist() == [[1, 0], [1, 0]]


def test_factor_of_small_images_is_found(tmp_path):
    write(tmp_path / "high/x.png", height=64, width=96)
    small = Image.fromarray(pixels(16, 24, 5))
    (tmp_path / "low").mkdir()
    small.save(tmp_path / "low/x.png")
    dataset = FolderValidation(str(tmp_path / "high"), size=32, beside={"LR_image": "../low/{path}.png"})
    expected = small.resize((8, 8), Image.Resampling.BICUBIC, (4, 0, 20, 16))
    assert np.array_equal(dataset[0]["LR_image"], values(np.asarray(expected)))
    with pytest.raises(UserError, match=r"is 4 times as large as .*, and size \(30\) is not divisible by that"):
        FolderValidation(str(tmp_path / "high"), size=30, beside={"LR_image": "../low/{path}.png"})


def test_label_maps_in_colour_need_a_palette(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}_map.png")
    message = r'beside\.segmentation: the label map ".*a_map\.png" is a colour image; .* with palette$'
    with pytest.raises(UserError, match=message):
        FolderTrain(str(tmp_path), size=8, beside={"segmentation": "{stem}_map.png"}, n_labels=4)


@pytest.mark.parametrize("form", ["json", "yolo", "column"])
def test_boxes_have_several_forms(form, tmp_path):
    write(tmp_path / "a.png", height=8, width=8)
    boxes = [{"label": 1, "box": [0.0, 0.25, 0.5, 0.75]}]
    params = {"beside": {"boxes": "{stem}.json"}}
    if form == "json":
        (tmp_path / "a.json").write_text(json.dumps(boxes))
    elif form == "yolo":
        (tmp_path / "a.txt").write_text("1 0.25 0.5 0.5 0.5\n")
        params = {"beside": {"boxes": "{stem}.txt"}}
    else:
        (tmp_path / "t.jsonl").write_text(json.dumps({"path": "a.png", "objects": boxes}))
        params = {"files": str(tmp_path / "t.jsonl"), "beside": {"boxes": "column:objects"}}
    dataset = FolderValidation(str(tmp_path), size=8, max_boxes=2, **params)
    tokens = dataset[0]["coordinates_bbox"]
    assert tokens.shape == (8,) and tokens.dtype == torch.int64
    layout = dataset.box_tokens.decode(tokens)
    assert layout.labels.tolist() == [1]
    assert layout.boxes[0].tolist() == pytest.approx([0, 0.25, 0.5, 0.5], abs=0.02)


def test_missing_and_damaged_companions_are_named_once_and_left_out(masked, caplog):
    for name in ("c", "d", "e"):
        write(masked / f"{name}.png")
    (masked / "d_mask.png").write_bytes(b"no image")
    (masked / "e_mask.png").write_bytes((masked / "a_mask.png").read_bytes()[:60])
    dataset = FolderValidation(str(masked), size=8, beside={"mask": "{stem}_mask.png"}, max_unreadable=0.5)
    assert names(dataset) == ["a.png", "b.png"]
    assert caplog.messages == [
        'FolderValidation: 1 of 5 images have no mask "{stem}_mask.png" and are left out: c.png',
        "FolderValidation: 2 of 4 images cannot be read and are left out: d.png, e.png",
    ]


def test_companion_of_other_proportions_is_replaced_by_another_item(masked, caplog):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(masked / "a_mask.png")
    dataset = FolderValidation(str(masked), size=16, beside={"mask": "{stem}_mask.png"})
    assert [item["relative_file_path_"] for item in dataset] == ["b.png", "b.png"]
    (message,) = caplog.messages
    assert "(8 × 8 pixels) has other proportions than its image (24 × 16)" in message


def test_invalid_boxes_are_named_once_and_left_out(tmp_path, caplog):
    contents = {
        "a": [{"label": "cat", "box": [0, 0, 1, 1]}],
        "b": [{"label": "cat", "box": [0.5, 0, 0.2, 1]}],
        "c": {"boxes": "none"},
        "d": [{"label": "dog", "box": [0, 0, 1, 1]}],
        "e": [],
    }
    for name, content in contents.items():
        write(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write(tmp_path / "f.png")
    dataset = FolderTrain(str(tmp_path), size=8, beside={"boxes": "{stem}.json"}, class_names=["cat"])
    assert names(dataset) == ["a.png", "e.png"]
    assert caplog.messages == [
        'FolderTrain: 1 of 6 images have no boxes in a file "{stem}.json" and are left out: f.png',
        'FolderTrain: 3 of 5 images have boxes that are not valid (the first: box 1 ("0") is empty: [0.5, 0, 0.2, 1] '
        "must be [left, top, right, bottom]) and are left out: b.png, c.png, d.png",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"boxes": [', "not JSON: Expecting value: line 1 column 12 (char 11)"),
        (b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        (b'{"boxes": "none"}', 'not a list of boxes, and without the key "boxes"'),
        (b"\xff\x00", 'cannot read the file of boxes "'),
    ],
)
def test_damaged_files_of_boxes_are_reported_with_the_reason(content, reason, tmp_path, caplog):
    for name, boxes in (("a", content), ("b", b"[]")):
        write(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.json").write_bytes(boxes)
    assert names(FolderTrain(str(tmp_path), size=8, beside={"boxes": "{stem}.json"})) == ["b.png"]
    (message,) = caplog.messages
    assert message.startswith(f"FolderTrain: 1 of 2 images have boxes that are not valid (the first: {reason}")
    assert message.endswith(") and are left out: a.png")


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"masks": "{stem}.png"}, 'beside has no entry "masks" (did you mean "mask"?); it has mask, segmentation'),
        ({"mask": "mask.png"}, 'the pattern "mask.png" names the same file for all images; use {stem} in it, or write'),
        ({"mask": "{steam}.png"}, 'the pattern "{steam}.png" has an unknown {steam}; choose from {stem}, {name}'),
        ({"mask": "{stem}_m.png"}, 'all 4 images have no mask "{stem}_m.png"; check beside.mask'),
        ({"mask": "column:m"}, 'beside.mask names the column "m", and there is no table'),
        ({"segmentation": "{stem}_mask.png"}, "label maps need n_labels, the number of labels, or class_names"),
    ],
)
def test_bad_sources_raise_user_error(beside, message, masked):
    with pytest.raises(UserError) as raised:
        FolderTrain(str(masked), size=8, beside=beside)
    assert message in str(raised.value) and "\n" not in str(raised.value)
