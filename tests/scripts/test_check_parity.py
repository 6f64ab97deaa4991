"""Tests of the script `check_parity`; tests/test_parity_replay.py tests the recorded cases themselves."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture
def main(load_script):
    return load_script("check_parity").main


def test_the_chosen_cases_are_reported_one_by_one(main, tmp_path, capsys):
    assert main(["--filter", "*_embedder", "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in printed[:-1]] == [
        ["1/5", "bert_embedder", "passed"],
        ["2/5", "transformer_embedder", "passed"],
        ["3/5", "class_embedder", "passed"],
        ["4/5", "frozen_clip_embedder", "passed"],
        ["5/5", "frozen_open_clip_embedder", "passed"],
    ]
    assert ["(allowed 1e-06)" in row for row in printed[:5]] == [False, False, True, False, False]
    assert printed[-1].startswith("5 cases, 5 outputs in ") and printed[-1].endswith("all as recorded")
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["case"]: row for row in report["results"]}
    assert {"bert_embedder", "transformer_embedder", "class_embedder"} < set(rows) and len(rows) == 5
    assert all(row["passed"] and 0 <= row["error"] < row["tolerance"] for row in rows.values())


def test_differences_and_errors_fail_and_hide_no_other_case(main, tmp_path, monkeypatch, capsys):
    from ldm.modules.ema import LitEma
    from ldm.modules.encoders.modules import SpatialRescaler

    def broken(self, x):
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(LitEma, "forward", lambda self, model: None)
    monkeypatch.setattr(SpatialRescaler, "forward", broken)
    assert main(["--filter", "ema", "spatial_res", "class_e*", "--json", str(tmp_path / "report.json")]) == 1
    printed = {row.split()[1]: row for row in capsys.readouterr().out.splitlines()}
    assert "FAILED weight " in printed["ema"] and "(allowed 1e-06), bias" in printed["ema"]
    assert "FAILED RuntimeError: no such thing" in printed["spatial_rescaler"]
    assert " passed " in printed["class_embedder"]
    assert "2 failed: " in printed["cases,"]
    rows = {row["case"]: row for row in json.loads((tmp_path / "report.json").read_text())["results"]}
    assert rows["spatial_rescaler"]["error"] is None and not rows["spatial_rescaler"]["passed"]


def test_a_filter_without_matches_is_one_line(main, capsys):
    assert main(["--filter", "vq_modl"]) == 2
    assert 'matches none of the 62 cases (did you mean "vq_model"?)' in capsys.readouterr().err


def test_it_runs_from_a_bare_clone_and_help_needs_no_torch(repo_root, tmp_path):
    script = str(repo_root / "scripts" / "check_parity.py")
    done = subprocess.run([sys.executable, script, "--filter", "ema"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("  1/1  ema  passed"), done.stderr
    words = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "--filter" in done.stdout and "ldm.cli.command" in imported and "torch" not in imported
