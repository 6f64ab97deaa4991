"""Tests of the benchmark `sampler_accuracy` with a tiny model and known distances."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import write_model

from ldm.pipelines.loading import load_model


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("sampler_accuracy", "benchmarks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


def test_distances_have_their_closed_form(script):
    reference = torch.randn(2, 4, 8, 8)
    latents = reference * torch.tensor([1.1, 0.8]).reshape(2, 1, 1, 1)
    assert torch.allclose(script.distances(latents, reference), torch.tensor([0.1, 0.2]))


def test_mean_psnr_has_its_closed_form(script):
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    assert script.mean_psnr(images, torch.zeros(2, 3, 4, 4)) == pytest.approx(30)  # 20 and 40 dB


def test_the_reference_has_no_distance_from_itself(script, folder, monkeypatch):
    """With 100 timesteps the reference is one of the runs, and runs with more steps are left out."""
    monkeypatch.setattr(script, "RUNS", (script.BASELINE, ("ddim", "exact", 100), ("dpm", "logsnr", 101)))
    model = load_model(folder / "config.yaml", folder / "model.ckpt")
    empty = model.get_learned_conditioning([""])
    with torch.no_grad():
        task = script.Task(model.get_learned_conditioning(["fox"]), empty, torch.randn(1, 3, 8, 8))
        same, baseline = script.measure(model, task, 2.0)
    assert (same.steps, same.distance, same.closer, same.psnr) == (100, 0.0, 1, pytest.approx(120))
    assert (baseline.steps, baseline.closer) == (50, 0) and 0 < baseline.distance == baseline.largest


def test_table_and_file_agree(script, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RUNS", (script.BASELINE, ("dpm", "logsnr", 10)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox\n\nred heart\nrainbow\n", encoding="utf-8-sig")
    options = ["--model", str(folder), "--from-file", str(prompts), "--n", "2", "--device", "cpu"]
    assert script.main([*options, "--scales", "1", "3", "--json", str(tmp_path / "rows.json")]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["settings"]["prompts"] == ["fox", "red heart"] and written["settings"]["precision"] == "float32"
    rows = [script.Row(**row) for row in written["rows"]]
    assert [row.scale for row in rows] == [1, 1, 3, 3]
    assert all(a.distance <= b.distance for a, b in (rows[:2], rows[2:]))
    assert script.table(rows, 2) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from-file", "{tmp}/gone.txt"], "there is no prompt file"),
        (["--from-file", "{tmp}/empty.txt"], "is empty"),
    ],
)
def test_an_unreadable_prompt_file_is_one_line(script, folder, tmp_path, capsys, options, message):
    (tmp_path / "empty.txt").write_text("\n")
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    assert script.main(["--model", str(folder), *options]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_default_prompts_are_in_the_vocabulary(script, repo_root):
    words = set((repo_root / "data/emoji/vocab.txt").read_text(encoding="utf-8").split())
    prompts = script.read_prompts(None, 16)
    assert len(set(prompts)) == 16 and {word for prompt in prompts for word in prompt.split()} <= words
