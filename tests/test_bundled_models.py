"""Tests of the bundled models: size, and quality of their images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldm.cli.main import main
from ldm.data.emoji import compose, load_drawings
from ldm.io.pixels import to_uint8

pytestmark = pytest.mark.slow

MEGABYTES = {"emoji64": 30, "emoji64-inpaint": 15, "emoji64-superres": 15}
TEXTS = {"emoji64": {"vocab.txt", "class_names.txt"}}
EXAMPLES = {  # each on a background colour that it did not have in training
    "alarm_clock": "red",
    "octopus": "blue",
    "penguin": "orange",
    "pineapple": "purple",
    "strawberry": "green",
    "sunflower": "black",
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_model_files_are_small(repo_root, name):
    files = list((repo_root / "models/ldm" / name).iterdir())
    assert {file.name for file in files} == {"config.yaml", "model.safetensors"} | TEXTS.get(name, set())
    assert sum(file.stat().st_size for file in files) <= MEGABYTES[name] * 1e6


def test_text_to_image_generates_the_requested_drawing(load_script, tmp_path):
    options = ["--n", "16", "--steps", "20", "--scale", "3", "--json", str(tmp_path / "scores.json")]
    assert load_script("evaluate_emoji").main(options) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["scores"]
    first_stage, seen, unseen, background = (row["value"] for row in rows)
    assert first_stage >= 26  # dB, over all pairs that training left out
    assert min(seen, unseen) >= 80  # per cent; chance is a tenth of one
    assert background >= 95


@pytest.mark.parametrize(
    ("model", "baseline", "margin"),
    [("emoji64-inpaint", "mean colour of the rest", 3.0), ("emoji64-superres", "bicubic", 2.5)],
)
def test_images_are_restored_better_than_by_a_simple_method(load_script, tmp_path, model, baseline, margin):
    options = ["--model", model, "--n", "24", "--steps", "20", "--json", str(tmp_path / "scores.json")]
    assert load_script("evaluate_restoration").main(options) == 0
    scores = {row["method"]: row for row in json.loads((tmp_path / "scores.json").read_text())["scores"]}
    assert scores[model]["psnr"] >= scores[baseline]["psnr"] + margin  # dB
    assert scores[model]["error"] < scores[baseline]["error"]


@pytest.mark.parametrize(
    ("command", "folder", "average", "worst"),
    [("inpaint", "inpainting_examples", 36, 46), ("superres", "superres_examples", 12, 12)],
)
def test_commands_use_the_bundled_models_by_default(repo_root, tmp_path, command, folder, average, worst):
    """Far from the root of the repository too; `average` and `worst` bound the error, in levels of 255."""
    images = repo_root / "data" / folder / "drawings"
    assert main([command, "--indir", str(images), "--outdir", str(tmp_path), "--steps", "20", "--seed", "1"]) == 0
    drawings, errors = load_drawings(64), []
    for name, colour in EXAMPLES.items():
        index = drawings.cldr_names.index(name.replace("_", " "))
        original = to_uint8(compose(drawings.rgba[index], colour)).astype(float)
        with Image.open(tmp_path / f"{name}.png") as file:
            difference = np.abs(np.asarray(file) - original).mean(-1)
        mask = np.ones((64, 64), bool)
        if command == "inpaint":
            with Image.open(images / f"{name}_mask.png") as file:
                mask = np.asarray(file) > 0
        assert difference[~mask].max(initial=0) <= 1, name
        errors.append(difference[mask].mean())
    assert np.mean(errors) < average and max(errors) < worst, errors
