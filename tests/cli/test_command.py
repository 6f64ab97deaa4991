"""Tests of `ldm.cli.command`."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
import torch
from tqdm import tqdm

from ldm.cli.command import _Handler, command, example, set_program
from ldm.errors import UserError


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (None, 0, ""),
        (UserError("what, where, what to do"), 2, "error: what, where, what to do"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
        (MemoryError(), 2, "error: out of memory"),
        (OSError(36, "File name too long", "x" * 300), 2, 'error: "xxx'),
        (OSError(5, "some libraries\n  use lines", "x"), 2, 'error: "x": some libraries use lines'),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_exit_status_and_message(raised, status, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # restores the stream that the command replaces

    @command
    def main(argv=None):
        if raised is not None:
            raise raised

    assert main([]) == status
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error) < 300 and error.count("\n") == bool(message)


def test_other_exceptions_are_raised():
    @command
    def main(argv=None):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main([])


def test_log_line_is_above_a_progress_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = _Handler(stream)
    with tqdm(total=3, file=stream) as progress:
        progress.update()
        handler.emit(logging.makeLogRecord({"msg": "error: what, where", "levelno": logging.ERROR}))
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert "error: what, where" in lines


def test_characters_outside_the_encoding_are_escaped():
    code = "from ldm.cli.command import command, say; command(lambda argv: say('3 \\xd7 4'))()"
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    done = subprocess.run(command, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == rb"3 \xd7 4"


def test_closed_pipe_is_not_an_error():
    code = "from ldm.cli.command import command, say; import sys; sys.exit(command(lambda argv: say(10**6 * 'x'))())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.parametrize(("program", "shown"), [(None, "python scripts/x.py -n 3"), ("ldm x", "ldm x -n 3")])
def test_example_has_the_form_of_the_call(program, shown):
    set_program(program)
    try:
        assert example("x", "-n 3") == f"example: {shown}"
    finally:
        set_program(None)
