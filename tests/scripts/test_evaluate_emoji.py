"""Tests of the script `evaluate_emoji` on samples with known scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_model

from ldm.data.emoji import BACKGROUNDS, EmojiValidation, compose
from ldm.errors import UserError


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("evaluate_emoji")


@pytest.fixture(scope="module")
def dataset():
    return EmojiValidation(64, split="held_out")


def samples(script, dataset, chosen, images):
    return script.Samples([dataset.pairs[i] for i in chosen], [dataset[i]["caption"] for i in chosen], images)


def test_cell_means_are_those_of_cells(script):
    image = np.arange(16 * 16 * 3, dtype=float).reshape(1, 16, 16, 3)
    cells = script.cell_means(image)[0]
    assert np.allclose(cells[1, 2], image[0, 2:4, 4:6].mean(axis=(0, 1)))


def test_correct_images_match_and_others_do_not(script, dataset):
    chosen = list(range(0, 60, 5))
    images = np.stack([dataset[i]["image"] for i in chosen])
    noisy = images + 0.1 * np.random.RandomState(0).randn(*images.shape)
    for correct in (images, noisy):
        sampled = samples(script, dataset, chosen, correct)
        assert script.drawings_match(sampled, dataset.drawings).all() and script.backgrounds_match(sampled).all()
    shifted = samples(script, dataset, [i + 300 for i in chosen], images)
    matches = script.drawings_match(shifted, dataset.drawings)
    assert matches.sum() <= 2, "two blue or yellow buttons resemble the requested one"


def test_a_wrong_background_does_not_match(script, dataset):
    index, requested = dataset.pairs[0]
    other = next(colour for colour in BACKGROUNDS if colour != requested)
    image = compose(dataset.drawings.rgba[index], other, size=64)[None]
    assert not script.backgrounds_match(samples(script, dataset, [0], image)).any()


def test_drawings_with_equal_names_or_pixels_are_the_same(script, dataset):
    from dataclasses import replace

    drawings = dataset.drawings
    names = list(drawings.cldr_names)
    names[1] = names[0]
    assert script.is_same(drawings, 5, 5) and not script.is_same(drawings, 0, 1)
    assert script.is_same(replace(drawings, cldr_names=tuple(names)), 0, 1)
    rgba = drawings.rgba.copy()
    rgba[1] = rgba[0]
    assert script.is_same(replace(drawings, rgba=rgba), 0, 1)


def test_the_border_colour_ignores_drawings_that_touch_it(script):
    image = np.full((1, 16, 16, 3), -1.0)
    image[:, :4, :6] = 1.0
    assert np.allclose(script.border_colour(image), -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


def test_noise_and_captions_follow_the_seed_alone(script, folder):
    from ldm.pipelines.loading import load_model
    from ldm.pipelines.text import TextToImage

    model = load_model(folder / "config.yaml", folder / "model.ckpt")
    dataset = EmojiValidation(16, split="seen")
    pipeline = TextToImage(steps=2, scale=2.0)
    sampled = []
    for size, seed in ((2, 0), (5, 0), (5, 1)):
        args = script.make_parser().parse_args(["--n", "5", "--batch_size", str(size), "--seed", str(seed)])
        sampled.append(script.sample(model, dataset, pipeline, args))
    assert sampled[0].captions == sampled[1].captions != sampled[2].captions
    assert np.allclose(sampled[0].images, sampled[1].images, atol=1e-3)


def test_the_command_reports_its_four_scores(script, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "reconstruct", lambda *args: np.array([20.0, 30.0]))
    options = ["--model", str(folder), "--n", "4", "--steps", "2", "--batch_size", "4"]
    options += ["--json", str(tmp_path / "scores.json"), "--grid", str(tmp_path / "grid.png")]
    assert script.main(options) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 6 and all(line.count("|") == 5 for line in lines)
    assert "25.0 dB" in lines[2] and "seen" in lines[3] and "held-out" in lines[4] and "background" in lines[5]
    written = json.loads((tmp_path / "scores.json").read_text())
    assert len(written["scores"]) == 4 and written["settings"]["steps"] == 2
    assert Image.open(tmp_path / "grid.png").width == 8 * 34 + 2


def test_the_first_stage_is_scored(script, folder):
    from ldm.pipelines.loading import load_model

    model = load_model(folder / "config.yaml", folder / "model.ckpt")
    dataset = EmojiValidation(16, split="held_out")
    dataset.pairs = dataset.pairs[:3]
    scores = script.reconstruct(model, dataset, 2)
    x = torch.from_numpy(dataset[2]["image"]).permute(2, 0, 1)[None]
    expected = model.first_stage_model(x, sample_posterior=False)[0].clamp(-1, 1)
    error = ((x - expected) / 2).pow(2).mean()
    assert scores.shape == (3,) and np.isclose(scores[2], -10 * torch.log10(error).item(), atol=1e-3)


@pytest.mark.parametrize("options", [["--model", "gone"], ["--ckpt", "gone.ckpt"]])
def test_a_missing_model_is_one_line(script, options, capsys):
    assert script.main(options) == 2
    assert "error: there is no" in capsys.readouterr().err


def test_images_that_are_not_finite_are_not_scored(script, folder, capsys, monkeypatch):
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.pipelines.loading import load_model

    model = load_model(folder / "config.yaml", folder / "model.ckpt")
    dataset = EmojiValidation(16, split="held_out")
    dataset.pairs = dataset.pairs[:3]
    decode = LatentDiffusion.decode_first_stage
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", lambda self, z: decode(self, z) * float("nan"))
    with pytest.raises(UserError, match="2 of 2 images of a batch are not finite; use --precision float32, or check"):
        script.reconstruct(model, dataset, 2)
    monkeypatch.setattr(script, "reconstruct", lambda *args: np.array([20.0, 30.0]))
    assert script.main(["--model", str(folder), "--n", "2", "--steps", "2"]) == 2
    assert "2 of 2 images of a batch are not finite" in capsys.readouterr().err
