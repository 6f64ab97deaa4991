"""The report on all recorded cases; what the cases mean is tested in tests/test_parity_replay.py."""

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
    said = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in said[:-1]] == [
        ["1/3", "bert_embedder", "passed"],
        ["2/3", "transformer_embedder", "passed"],
        ["3/3", "class_embedder", "passed"],
    ]
    assert all("(allowed 1e-05)" in row for row in said[:2]) and "(allowed 1e-06)" in said[2]
    assert said[-1].startswith("3 cases, 3 outputs in ") and said[-1].endswith("all as recorded")
    report = json.loads((tmp_path / "report.json").read_text())
    rows = {row["case"]: row for row in report["results"]}
    assert set(rows) == {"bert_embedder", "transformer_embedder", "class_embedder"}
    assert all(row["passed"] and 0 <= row["error"] < row["tolerance"] for row in rows.values())


def test_a_difference_and_a_case_that_breaks_fail_and_hide_no_other(main, tmp_path, monkeypatch, capsys):
    from ldm.modules.ema import LitEma
    from ldm.modules.encoders.modules import SpatialRescaler

    def broken(self, x):
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(LitEma, "forward", lambda self, model: None)
    monkeypatch.setattr(SpatialRescaler, "forward", broken)
    with pytest.raises(SystemExit) as status:
        main(["--filter", "ema", "spatial_res", "class_e*", "--json", str(tmp_path / "report.json")])
    assert status.value.code == 1
    said = {row.split()[1]: row for row in capsys.readouterr().out.splitlines()}
    assert "FAILED weight " in said["ema"] and "(allowed 1e-06), bias" in said["ema"]
    assert "FAILED RuntimeError: no such thing" in said["spatial_rescaler"]
    assert " passed " in said["class_embedder"]
    assert "2 failed: " in said["cases,"]
    rows = {row["case"]: row for row in json.loads((tmp_path / "report.json").read_text())["results"]}
    assert rows["spatial_rescaler"]["error"] is None and not rows["spatial_rescaler"]["passed"]


def test_a_filter_that_means_nothing_is_told(main, capsys):
    assert main(["--filter", "vq_modl"]) == 2
    assert 'means none of the 50 cases (did you mean "vq_model"?)' in capsys.readouterr().err


def test_it_runs_from_a_bare_clone_and_helps_without_torch(repo_root, tmp_path):
    script = str(repo_root / "scripts" / "check_parity.py")
    done = subprocess.run([sys.executable, script, "--filter", "ema"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("  1/1  ema  passed"), done.stderr
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[1], run_name='__main__')\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, script, "--help"], capture_output=True, text=True)
    assert "--filter" in done.stdout and "torch" not in done.stdout.splitlines()[-1].split()
