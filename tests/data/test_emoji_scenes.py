"""Tests of the scenes of several emoji drawings."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.emoji import BACKGROUNDS, COLOURS, load_drawings
from ldm.data.emoji_scenes import (
    LABEL_COLOURS,
    LABELS,
    OVERLAP,
    Placement,
    Scene,
    SceneTrain,
    SceneValidation,
    describe,
    label_map,
    overlap,
    position_words,
    render,
)
from ldm.data.layout_tokens import LayoutTokenBuilder
from ldm.errors import UserError
from ldm.io.pixels import to_uint8

ENTRIES = {
    "image": ((64, 64, 3), np.float32),
    "segmentation": ((64, 64, 11), np.float32),
    "mask": ((64, 64, 1), np.float32),
    "masked_image": ((64, 64, 3), np.float32),
    "LR_image": ((16, 16, 3), np.float32),
}


def drawing(name):
    return load_drawings(64).cldr_names.index(name)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# -- items -----------------------------------------------------------------------------------------------------


def test_items_have_the_entries_of_every_task():
    item = SceneValidation()[3]
    for key, (shape, dtype) in ENTRIES.items():
        assert item[key].shape == shape and item[key].dtype == dtype, key
    assert item["coordinates_bbox"].shape == (92,) and item["coordinates_bbox"].dtype == torch.int64
    assert item["human_label"] == COLOURS[item["class_label"]]
    assert item["caption"].endswith(f"on a {item['human_label']} background")
    assert {*item} == {*ENTRIES, "coordinates_bbox", "caption", "class_label", "human_label"}


@pytest.mark.parametrize("size", [64, 128])
def test_entries_agree_with_each_other(size):
    scenes = SceneValidation(size)
    builder = LayoutTokenBuilder(len(scenes.drawings))
    for index in range(12):
        item, scene = scenes[index], scenes.scene(index)
        assert 2 <= len(scene.placements) <= 5
        decoded = builder.decode(item["coordinates_bbox"])
        assert sorted(decoded.labels) == sorted(each.drawing for each in scene.placements)
        visible = render(scene, scenes.drawings, size).boxes
        boxes = {each.drawing: box for each, box in zip(scene.placements, visible, strict=True)}
        for label, box in zip(decoded.labels, decoded.boxes, strict=True):
            np.testing.assert_allclose(box, boxes[label], atol=1 / 88)  # half a cell of the grid at each end
            assert scenes.drawings.cldr_names[label] in item["caption"]
        np.testing.assert_array_equal(item["segmentation"].argmax(-1), label_map(item["image"]))
        np.testing.assert_array_equal(item["segmentation"].sum(-1), 1)
        hidden = item["mask"][..., 0] > 0
        assert 0 < hidden.mean() <= 0.6
        np.testing.assert_array_equal(item["masked_image"][~hidden], item["image"][~hidden])
        assert (item["masked_image"][hidden] == -1).all()
        small = item["image"].reshape(size // 4, 4, size // 4, 4, 3).mean(axis=(1, 3))
        assert np.abs(item["LR_image"] - small).mean() < 0.12


def test_the_low_resolution_image_has_the_chosen_factor():
    assert SceneValidation(downscale_f=8)[0]["LR_image"].shape == (8, 8, 3)


def test_drawings_are_those_of_the_scene():
    """Outside of the boxes there is only the background, and inside of a box there are pixels of its drawing."""
    scenes = SceneValidation()
    for index in range(8):
        scene = scenes.scene(index)
        rendering = render(scene, scenes.drawings, 64)
        outside = np.ones((64, 64), bool)
        for x, y, width, height in rendering.boxes:
            left, top, right, bottom = (round(64 * value) for value in (x, y, x + width, y + height))
            outside[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = False
            assert len(np.unique(to_uint8(rendering.image)[top:bottom, left:right].reshape(-1, 3), axis=0)) > 4
        background = np.array(BACKGROUNDS[scene.background]) / 127.5 - 1
        assert np.abs(rendering.image[outside] - background).max() < 1.0
        assert np.median(np.abs(rendering.image[outside] - background)) < 1e-6


def test_later_drawings_cover_earlier_ones():
    drawings = load_drawings(64)
    first, second = (Placement(drawing(name), 0.5, 0.5, 0.5) for name in ("white large square", "black large square"))
    both = render(Scene("red", (first, second)), drawings, 64)
    alone = render(Scene("red", (second,)), drawings, 64)
    opaque = slice(24, 40)
    np.testing.assert_array_equal(both.image[opaque, opaque], alone.image[opaque, opaque])
    assert both.boxes == alone.boxes * 2


# -- randomness ------------------------------------------------------------------------------------------------


def test_validation_depends_on_the_index_only():
    first, second = SceneValidation(), SceneValidation()
    torch.manual_seed(1)
    item = first[7]
    torch.manual_seed(2)
    assert equal(item, second[7]) and not equal(item, second[8])


def test_validation_scenes_stay_the_same():
    """Scores of models are comparable only if the scenes are."""
    captions = "\n".join(SceneValidation()[index]["caption"] for index in range(64))
    assert hashlib.sha256(captions.encode()).hexdigest()[:16] == "444409346d8d2f56"


def test_training_follows_the_global_generator():
    scenes = SceneTrain()
    torch.manual_seed(5)
    first = [scenes[0] for _ in range(2)]
    torch.manual_seed(5)
    again = [scenes[0] for _ in range(2)]
    assert equal(first[0], again[0]) and equal(first[1], again[1]) and not equal(*first)


def test_items_are_collated():
    batch = next(iter(DataLoader(SceneTrain(length=4), batch_size=4)))
    assert batch["image"].shape == (4, 64, 64, 3) and batch["coordinates_bbox"].shape == (4, 92)


# -- parts -----------------------------------------------------------------------------------------------------


def test_drawings_hardly_overlap():
    scenes = SceneValidation(count=(5, 5))
    for index in range(40):
        squares = [each.square for each in scenes.scene(index).placements]
        assert max(overlap(a, b) for i, a in enumerate(squares) for b in squares[:i]) <= OVERLAP
        assert all(x >= 0 and y >= 0 and x + w <= 1 + 1e-9 and y + h <= 1 + 1e-9 for x, y, w, h in squares)


def test_many_drawings_become_smaller():
    sides = [each.scale for each in SceneValidation(count=(20, 20)).scene(0).placements]
    assert len(sides) == 20 and min(sides) < 0.3 and max(sides) >= 0.32


def test_few_names_repeat():
    scenes = SceneValidation(names=["fox", "rocket"], count=(4, 4))
    classes = {each.drawing for index in range(4) for each in scenes.scene(index).placements}
    assert classes == {drawing("fox"), drawing("rocket")}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5), 1),
        ((0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5), 0),
        ((0, 0, 0.5, 0.5), (0.25, 0.25, 0.25, 0.25), 1),
        ((0, 0, 0.5, 0.5), (0.25, 0, 0.5, 0.5), 0.5),
    ],
)
def test_overlap_is_a_fraction_of_the_smaller_box(a, b, expected):
    assert overlap(a, b) == overlap(b, a) == expected


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (0.1, 0.1, "at the top left"),
        (0.5, 0.1, "at the top"),
        (0.9, 0.5, "on the right"),
        (0.5, 0.5, "in the middle"),
        (0.5, 1.0, "at the bottom"),
        (1.0, 1.0, "at the bottom right"),
    ],
)
def test_positions_in_words(x, y, words):
    assert position_words(x, y) == words


def test_caption():
    scene = Scene("blue", (Placement(0, 0.4, 0.2, 0.2), Placement(1, 0.4, 0.8, 0.5)))
    assert describe(scene, ["fox", "rocket"]) == "fox at the top left, rocket on the right, on a blue background"


def test_label_map_names_the_nearest_colour():
    pixels = np.array([list(LABEL_COLOURS.values())], np.uint8)
    image = pixels.astype(np.float32) / 127.5 - 1
    assert label_map(image).tolist() == [list(range(len(LABELS)))]
    near = np.clip(image + 0.08, -1, 1)
    assert label_map(near).tolist() == [list(range(len(LABELS)))]
    assert LABELS[:8] == COLOURS


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": 65}, "size must be a multiple of downscale_f (4), not 65"),
        ({"count": [3, 2]}, "count must be two numbers from 1 to 30, the smaller first, not [3, 2]"),
        ({"count": [0, 2]}, "count must be two numbers from 1 to 30"),
        ({"count": [2, 31]}, "count must be two numbers from 1 to 30"),
        ({"scale": [0.5, 1.5]}, "scale must be two numbers above 0 and up to 1"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"names": ["foxx"]}, 'there is no emoji drawing "foxx" (did you mean "fox"'),
    ],
)
def test_invalid_parameters_raise_user_error(params, message):
    with pytest.raises(UserError) as error:
        SceneTrain(**params)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_indices_beyond_the_end_raise_index_error():
    with pytest.raises(IndexError):
        SceneValidation(length=3)[3]
    assert len(list(SceneValidation(length=3))) == len(SceneValidation(length=3)) == 3
