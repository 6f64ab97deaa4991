"""Tests of the script `evaluate_scenes` and of its scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from _scene_scores import (
    WHOLE,
    BoxContents,
    frechet_distance,
    mean_iou,
    nearest_backgrounds,
    share_of_boxes,
    share_of_neighbours,
)
from omegaconf import OmegaConf
from PIL import Image
from test_state_dict_keys import without_files
from tiny_models import write_model

from ldm.data.emoji import COLOURS, compose, load_drawings
from ldm.data.emoji_scenes import LABEL_COLOURS, SceneValidation, label_map

FLAT = "most frequent colour of each map"


@pytest.fixture(scope="module")
def evaluate(load_script):
    return load_script("evaluate_scenes")


def untrained(name, repo_root):
    """Return the configuration of a twin with a small network, a random first stage and few timesteps."""
    config = OmegaConf.to_container(OmegaConf.load(repo_root / f"configs/emoji/{name}.yaml"), resolve=True)
    model = without_files(config["model"])
    model["params"]["unet_config"]["params"]["model_channels"] = 32
    return {**model, "params": {**model["params"], "timesteps": 10, "use_ema": False}}


# -- scores ----------------------------------------------------------------------------------------------------


def test_drawings_are_recognised_in_their_boxes():
    scenes = SceneValidation(names=["fox", "rocket", "pizza", "snowman", "ghost", "robot"])
    items = [scenes[index] for index in range(20)]
    layouts = [scenes.layout_tokens.decode(item["coordinates_bbox"]) for item in items]
    contents = BoxContents(scenes.drawings, scenes.classes)
    images = np.stack([item["image"] for item in items])
    assert share_of_boxes(images, layouts, contents) == 100
    assert share_of_boxes(np.roll(images, 1, axis=0), layouts, contents) < 50


def test_one_wrong_box_of_four_counts():
    scenes = SceneValidation(names=["fox", "rocket", "pizza", "ghost"], count=(4, 4))
    item = scenes[0]
    layout = scenes.layout_tokens.decode(item["coordinates_bbox"])
    layout.labels[0] = next(index for index in scenes.classes if index != layout.labels[0])
    contents = BoxContents(scenes.drawings, scenes.classes)
    assert share_of_boxes(item["image"][None], [layout], contents) == 75


def test_whole_drawings_are_recognised_on_any_background():
    drawings = load_drawings(64)
    contents = BoxContents(drawings, range(len(drawings)), with_margins=True)
    for number, index in enumerate((3, 285, 919, 1160)):
        colour = COLOURS[number]
        image = compose(drawings.rgba[index], colour)
        assert contents.nearest(image, WHOLE, compose(drawings.rgba[index] * 0, colour)[0, 0]) == index


def test_the_share_of_neighbours_counts_images():
    drawings = load_drawings(64)
    images = np.stack([compose(drawings.rgba[index], "blue", 0.9) for index in (285, 919, 1160, 210)])
    neighbours = np.array([[285, 1], [2, 919], [3, 4], [5, 6]])
    assert share_of_neighbours(images, drawings, neighbours) == 50


def test_mean_iou_in_closed_form():
    expected = np.zeros((1, 4, 4), int)
    expected[0, :2] = 1
    predicted = expected.copy()
    predicted[0, 0] = 2  # a label that is not expected
    assert mean_iou(expected, expected) == 1
    assert mean_iou(predicted, expected) == pytest.approx((1 + 0.5) / 2)


def test_frechet_distance_in_closed_form():
    random = np.random.default_rng(0)
    images = random.standard_normal((400, 8, 8, 3)).astype(np.float32)
    assert frechet_distance(images, images) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(images, images + 0.5) == pytest.approx(48 * 0.25, rel=1e-4)
    cells = images.reshape(400, 4, 2, 4, 2, 3).mean(axis=(2, 4)).reshape(400, -1)
    trace = np.trace(np.cov(cells, rowvar=False))
    assert frechet_distance(images, 3 * images) == pytest.approx(
        4 * trace + 4 * np.square(cells.mean(0)).sum(), rel=1e-3
    )


def test_backgrounds_are_those_of_the_edge():
    drawing = load_drawings(64).rgba[919]
    images = np.stack([compose(drawing, colour, 0.6) for colour in COLOURS])
    assert nearest_backgrounds(images + 0.05).tolist() == list(range(8))


# -- command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("scenes_unconditional", ["samples", "other validation scenes", "their reconstructions"], 1),
        ("scenes_class", ["samples", "validation scenes"], 1),
        pytest.param(
            "scenes_layout", ["samples", "validation scenes", "their reconstructions"], 3, marks=pytest.mark.slow
        ),
        ("scenes_semantic", ["samples", "reconstructions of the scenes", FLAT, "maps of other scenes"], 3),
        pytest.param("drawings_retrieval", ["swapped database", "own database"], 5, marks=pytest.mark.slow),
    ],
)
def test_the_command_writes_table_scores_and_sheet(evaluate, repo_root, tmp_path, capsys, name, rows, columns):
    write_model(tmp_path / "tiny", untrained(name, repo_root))
    options = ["--model", str(tmp_path / "tiny"), "--n", "4", "--steps", "2", "--seed", "3"]
    files = ["--json", str(tmp_path / "s.json"), "--grid", str(tmp_path / "s.png")]
    assert evaluate.main([*options, *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in printed[2:]] == rows
    content = json.loads((tmp_path / "s.json").read_text())
    scores = {row["images"]: row["value"] for row in content["scores"]}
    assert [*scores] == rows and all(np.isfinite(value) for value in scores.values())
    assert content["settings"]["scale"] == (1 if name in ("scenes_unconditional", "scenes_semantic") else 2)
    if FLAT in scores:
        assert scores["maps of other scenes"] < scores[FLAT] < 0.6
    if "validation scenes" in scores:
        assert scores["validation scenes"] == 100
    with Image.open(tmp_path / "s.png") as file:
        side = 130 if name == "scenes_layout" else 66
        assert file.size == (4 * columns * side + 2, side + 2)


def test_other_data_can_be_named(evaluate, repo_root, tmp_path, capsys):
    write_model(tmp_path / "tiny", untrained("scenes_class", repo_root))
    train = {
        "target": "ldm.data.emoji_scenes.SceneValidation",
        "params": {"names": ["fox"], "count": [1, 1], "length": 3},
    }
    OmegaConf.save({"data": {"target": "x", "params": {"validation": train}}}, tmp_path / "data.yaml")
    options = ["--model", str(tmp_path / "tiny"), "--steps", "1", "--data", str(tmp_path / "data.yaml")]
    assert evaluate.main([*options, "--grid", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as file:
        assert file.size == (3 * 66 + 2, 66 + 2)
    OmegaConf.save({"data": {"target": "x"}}, tmp_path / "data.yaml")
    assert evaluate.main(options) == 2
    assert "has no data.params.validation; choose another one with --data" in capsys.readouterr().err


def test_restoration_uses_scenes(load_script, tmp_path, repo_root, capsys):
    script = load_script("evaluate_restoration")
    write_model(tmp_path / "tiny", untrained("scenes_inpaint", repo_root))
    options = ["--model", str(tmp_path / "tiny"), "--n", "3", "--steps", "1"]
    data = ["--data", "configs/emoji/scenes_inpaint.yaml"]
    assert script.main([*options, *data, "--json", str(tmp_path / "s.json")]) == 0
    scores = {row["method"]: row["psnr"] for row in json.loads((tmp_path / "s.json").read_text())["scores"]}
    assert script.main([*options, "--json", str(tmp_path / "t.json")]) == 0
    drawings = {row["method"]: row["psnr"] for row in json.loads((tmp_path / "t.json").read_text())["scores"]}
    assert scores["Telea (OpenCV)"] != drawings["Telea (OpenCV)"]
    capsys.readouterr()
    assert script.main([*options, "--data", "configs/emoji/txt2img_64.yaml"]) == 2
    assert 'the model "tiny" needs 64 px and "masked_image"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the model with --model, or with --config and --ckpt"),
        (["--model", "emoji64-inpaint"], "use scripts/evaluate_restoration.py --data for in-painting"),
        (["--model", "emoji64"], 'is conditioned on "caption"; use scripts/evaluate_emoji.py'),
    ],
)
def test_other_models_are_one_line(evaluate, capsys, options, message):
    assert evaluate.main(options) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error.removeprefix("error: ")


def test_label_maps_of_samples_use_the_colours_of_the_data():
    image = np.array(list(LABEL_COLOURS.values()), np.float32)[None] / 127.5 - 1
    assert mean_iou(label_map(image[None]), np.arange(11)[None, None]) == 1
