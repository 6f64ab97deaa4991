"""Tests of the command `ldm` and its sub-commands."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from task_checks import run_without_torch

from ldm.cli.main import COMMANDS, main
from ldm.config.distribution import version


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys, words):
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and description in printed for name, description in COMMANDS.items())


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ldm {version()}\n"


def test_unknown_command_is_one_line(capsys):
    assert main(["text2img"]) == 2
    error = capsys.readouterr().err
    assert error == 'error: there is no command "text2img" (did you mean "txt2img"?); see ldm --help\n'


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(capsys, name):
    with pytest.raises(SystemExit) as exit:
        main([name.replace("_", "-"), "--help"])
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and printed.startswith(f"usage: ldm {name}")
    assert callable(import_module(f"ldm.cli.{name}").main)


def test_arguments_of_the_process_are_the_default(tmp_path):
    command = [sys.executable, "-m", "ldm.cli.main", "txt2img", "--model", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: there is no model "none"')


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"], ["superres"], ["knn2img", "--knn", "x"]])
def test_commands_start_without_torch(words):
    assert run_without_torch(*words)[0] in (0, 2)
