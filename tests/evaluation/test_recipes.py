"""Recipes of evaluations."""

from __future__ import annotations

import json

import pytest
from feature_networks import random_images, write_images, write_network

from ldm.cli.evaluate import make_parser
from ldm.cli.main import main as ldm
from ldm.config.assets import ROOT
from ldm.config.model_files import CONFIGS_ELSEWHERE, available_models
from ldm.errors import UserError
from ldm.evaluation.published import read_published
from ldm.evaluation.recipes import read_recipe

RECIPES = sorted(path for path in (ROOT / "configs/evaluation").glob("*.yaml") if path.stem != "published")
MODELS = {
    *CONFIGS_ELSEWHERE,
    *(path.name for place in ("ldm", "first_stage_models") for path in (ROOT / "models" / place).iterdir()),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_options_of_each_run_exist(path):
    runs = read_recipe(path)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        args = make_parser().parse_args(list(run.words))
        assert run.row and args.task == run.words[0]
        for name in ("reference_config", "data"):
            config = getattr(args, name, None)
            assert config is None or (ROOT / config).is_file()
        assert getattr(args, "model", None) in {None, *MODELS}


def test_recipes_cover_the_published_rows_of_this_project():
    rows = " ".join(run.row for path in RECIPES for run in read_recipe(path))
    for row in read_published():
        if row.task == "reconstructions":
            assert f"model zoo: {row.method}" in rows
    for table in ("table 1", "table 3", "table 5", "table 7"):
        assert f"paper, {table}" in rows


def test_words_of_a_run(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "runs:\n  - {name: a, task: samples, arguments: [x], options: {n: 3, classes: [cat, dog], allow-few: true, "
        "size: null, no-cache: false}}\n  - {name: b, task: restorations, row: a row}\n"
    )
    first, second = read_recipe(path)
    assert first.words == ("samples", "x", "--n", "3", "--classes", "cat", "dog", "--allow-few")
    assert (second.name, second.row, second.words) == ("b", "a row", ("restorations",))
    assert [run.name for run in read_recipe(path, ["b"])] == ["b"]
    with pytest.raises(UserError, match='has no run "c"; known: a, b'):
        read_recipe(path, ["c"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "list indices"),
        ("runs: 3", "not iterable"),
        ("runs: [{name: a}]", "'task'"),
        ("runs: [{name: a, task: b}]", 'task "b" is not one of samples'),
        ("runs: [{name: a, task: samples, option: {}}]", 'unknown key "option"'),
        ("{", "expected the node content"),
    ],
)
def test_other_files_raise_user_error(tmp_path, text, reason):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=f"is not a recipe of ldm evaluate .*{reason}") as caught:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no recipe"):
        read_recipe(tmp_path / "nothing.yaml")


def test_runs_of_a_recipe_are_evaluated_with_further_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_network(tmp_path / "net.pt")
    write_images(tmp_path / "a", random_images(10))
    run = (
        "{name: %s, row: row %s, task: samples, arguments: [a], options: {reference: a, metrics: fid, no-cache: true}}"
    )
    (tmp_path / "r.yaml").write_text("runs:\n" + "".join(f"  - {run % (name, name)}\n" for name in "xy"))
    words = ["evaluate", "recipe", "r.yaml", "--features", "net.pt", "--device", "cpu", "--n", "8"]
    assert ldm(words) == 0
    out = capsys.readouterr().out
    assert "x: row x\n" in out and "y: row y\n" in out
    first, second = (json.loads(path.read_text()) for path in (tmp_path / "outputs/evaluation").iterdir())
    assert first["protocol"] == second["protocol"] and first["protocol"]["images"] == 8
    assert ldm([*words[:1], "recipe", "--only", "y", "r.yaml", "--features", "nothing"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "y: row y\n" and 'error: there is no file "nothing"' in captured.err


@pytest.mark.slow
def test_recipe_of_the_bundled_model_at_a_small_count(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "emoji64" in available_models()
    write_network(tmp_path / "net.pt")
    common = ("--features", "net.pt", "--device", "cpu", "--n", "10")
    path = str(ROOT / "configs/evaluation/emoji.yaml")
    samples = ("--steps", "2", "--reference-n", "10", "--kid-subset-size", "5", "--no-cache")
    assert ldm(["evaluate", "recipe", "--only", "samples", path, *common, *samples, "--json", "s.json"]) == 0
    assert ldm(["evaluate", "recipe", "--only", "first-stage", path, *common, "--no-lpips", "--json", "f.json"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["sampling"]["guidance"] == 3.0 and found["protocol"]["size"] == "64 × 64"
    assert {*found["figures"][""]} == {"fid", "kid", "is", "precision", "recall"}
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["figures"][""]["psnr"]["value"] > 25
    assert ldm(["evaluate", "table", "s.json", "f.json"]) == 0
    assert "| **emoji64** |" in capsys.readouterr().out
