"""Tests that the published scripts call the commands of `ldm.cli`."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ldm.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
OTHER_NAMES = {"train": ROOT / "main.py", "prepare": ROOT / "scripts" / "prepare_data.py"}
SCRIPTS = {name: OTHER_NAMES.get(name, ROOT / "scripts" / f"{name}.py") for name in COMMANDS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_calls_main_of_its_command(name, monkeypatch):
    calls = []
    module = import_module(f"ldm.cli.{name}")
    monkeypatch.setattr(module, "main", lambda argv=None: calls.append(sys.argv[1:] if argv is None else argv) or 7)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[name]), "--option", "value"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    assert calls == [["--option", "value"]] and ended.value.code == 7


@pytest.mark.parametrize("name", COMMANDS)
def test_sub_command_calls_main_of_its_module(name, monkeypatch):
    calls = []
    monkeypatch.setattr(import_module(f"ldm.cli.{name}"), "main", lambda argv: calls.append(argv) or 7)
    assert import_module("ldm.cli.main").main([name.replace("_", "-"), "--option", "value"]) == 7
    assert calls == [["--option", "value"]]
