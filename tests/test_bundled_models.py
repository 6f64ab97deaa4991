"""The models in the repository do what they are there for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldm.data.emoji import compose, load_drawings
from ldm.io.pixels import to_uint8

pytestmark = pytest.mark.slow

MEGABYTES = {"emoji64": 30, "emoji64-inpaint": 15, "emoji64-superres": 15}
EXAMPLES = {  # each on a background that no model was shown it on
    "alarm_clock": "red",
    "octopus": "blue",
    "penguin": "orange",
    "pineapple": "purple",
    "strawberry": "green",
    "sunflower": "black",
}


@pytest.mark.parametrize("name", MEGABYTES)
def test_they_stay_small(repo_root, name):
    files = list((repo_root / "models/ldm" / name).iterdir())
    assert {file.name for file in files} == {"config.yaml", "model.safetensors"}
    assert sum(file.stat().st_size for file in files) <= MEGABYTES[name] * 1e6


def test_text_becomes_the_drawing_asked_for(load_script, tmp_path):
    options = ["--n", "16", "--steps", "20", "--scale", "3", "--json", str(tmp_path / "scores.json")]
    assert load_script("evaluate_emoji").main(options) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["scores"]
    first_stage, seen, never_shown, background = (row["value"] for row in rows)
    assert first_stage >= 26  # dB, of all pairs never shown
    assert min(seen, never_shown) >= 80  # per cent; chance is a tenth of one
    assert background >= 95


@pytest.mark.parametrize(
    ("model", "rival", "ahead"),
    [("emoji64-inpaint", "mean colour of the rest", 3.0), ("emoji64-superres", "bicubic", 2.5)],
)
def test_pictures_are_restored_better_than_by_a_simple_method(load_script, tmp_path, model, rival, ahead):
    options = ["--model", model, "--n", "24", "--steps", "20", "--json", str(tmp_path / "scores.json")]
    assert load_script("evaluate_restoration").main(options) == 0
    scores = {row["method"]: row for row in json.loads((tmp_path / "scores.json").read_text())["scores"]}
    assert scores[model]["psnr"] >= scores[rival]["psnr"] + ahead  # dB
    assert scores[model]["error"] < scores[rival]["error"]


@pytest.mark.parametrize(
    ("script", "folder", "average", "worst"),
    [("inpaint", "inpainting_examples", 36, 46), ("superres", "superres_examples", 12, 12)],
)
def test_the_commands_take_them_for_the_drawings_among_the_examples(
    load_script, repo_root, tmp_path, capsys, script, folder, average, worst
):
    """Without --model, far from the repository's root; `average` and `worst`: bounds of the error, of 255 levels."""
    pictures = repo_root / "data" / folder / "drawings"
    options = ["--indir", str(pictures), "--outdir", str(tmp_path), "--steps", "20", "--seed", "1"]
    assert load_script(script).main(options) == 0
    drawings, errors = load_drawings(64), []
    for name, colour in EXAMPLES.items():
        index = drawings.cldr_names.index(name.replace("_", " "))
        original = to_uint8(compose(drawings.rgba[index], colour)).astype(float)
        with Image.open(tmp_path / f"{name}.png") as file:
            difference = np.abs(np.asarray(file) - original).mean(-1)
        mask = np.ones((64, 64), bool)
        if script == "inpaint":
            with Image.open(pictures / f"{name}_mask.png") as file:
                mask = np.asarray(file) > 0
        assert difference[~mask].max(initial=0) <= 1, name
        errors.append(difference[mask].mean())
    assert np.mean(errors) < average and max(errors) < worst, errors
