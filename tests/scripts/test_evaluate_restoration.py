"""Tests of the script `evaluate_restoration` against closed forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import inpainting_config, superresolution_config, write_model

from ldm.pipelines.inpainting import MaskedImage


@pytest.fixture(scope="module")
def evaluate(load_script):
    return load_script("evaluate_restoration")


def test_scores_have_their_closed_form(evaluate):
    originals = np.full((2, 4, 4, 3), 100, np.uint8)
    results = originals.copy()
    results[0, 0] += 10  # inside
    results[1, 0] += 20
    results[:, 3] = 255  # outside
    where = np.zeros((2, 4, 4), bool)
    where[:, :2] = True
    row = evaluate.score("x", originals, results, where)
    psnrs = [10 * np.log10(255**2 / (d**2 / 2)) for d in (10, 20)]
    assert row.psnr == pytest.approx(np.mean(psnrs)) and row.error == pytest.approx((5 + 10) / 2)
    assert evaluate.score("x", originals, originals, where).psnr == pytest.approx(100)


def test_the_mean_colour_is_that_of_the_unmasked_part(evaluate):
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = [[10, 20, 30], [30, 40, 50]]
    mask = np.array([[False, False], [True, True]])
    filled = evaluate.fill_with_mean(MaskedImage(image, mask))
    assert filled[1].tolist() == [[20, 30, 40]] * 2 and (filled[0] == image[0]).all()


@pytest.mark.parametrize(
    ("config", "methods", "columns"),
    [
        (inpainting_config(), ["mean colour of the rest", "Telea (OpenCV)", "tiny"], 5),
        (superresolution_config(), ["bicubic", "tiny"], 3),
    ],
    ids=["inpainting", "superresolution"],
)
def test_the_command_writes_table_scores_and_grid(evaluate, tmp_path, capsys, config, methods, columns):
    write_model(tmp_path / "tiny", config)
    options = ["--n", "5", "--steps", "1", "--batch_size", "3", "--model", str(tmp_path / "tiny")]
    assert evaluate.main([*options, "--json", str(tmp_path / "s.json"), "--grid", str(tmp_path / "s.png")]) == 0
    printed = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in printed.out.splitlines()[2:]] == methods
    content = json.loads((tmp_path / "s.json").read_text())
    assert [row["method"] for row in content["scores"]] == methods and content["settings"]["n"] == 5
    with Image.open(tmp_path / "s.png") as file:
        assert file.size == (columns * 18 + 2, 5 * 18 + 2)
    again = [*options[:5], "5", *options[6:], "--json", str(tmp_path / "t.json")]
    assert evaluate.main(again) == 0
    other = json.loads((tmp_path / "t.json").read_text())
    for a, b in zip(content["scores"], other["scores"], strict=True):
        assert a["psnr"] == pytest.approx(b["psnr"], abs=0.05), "the batch size does not matter"


def test_telea_fills_the_masked_part(evaluate):
    image = np.full((16, 16, 3), 90, np.uint8)
    image[4:8, 4:8] = 0
    filled = evaluate.fill_by_telea(MaskedImage(image, (image == 0).all(-1)))
    assert (filled[image > 0] == 90).all() and np.abs(filled.astype(int) - 90).max() <= 2


def test_a_model_for_another_task_is_one_line(evaluate, tmp_path, capsys):
    assert evaluate.main(["--model", "emoji64"]) == 2
    assert 'is conditioned on "caption"; choose an in-painting' in capsys.readouterr().err
