"""How commands end, and what their options accept."""

from __future__ import annotations

import argparse
import io
import logging
import subprocess
import sys

import pytest
import torch
from tqdm import tqdm

from ldm import cli
from ldm.errors import UserError


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UserError("what, where, what to do"), 2, "error: what, where, what to do"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
        (MemoryError(), 2, "error: out of memory"),
        (OSError(36, "File name too long", "x" * 300), 2, 'error: "xxx'),
        (OSError(5, "some libraries\n  tell it in lines", "x"), 2, 'error: "x": some libraries tell it in lines'),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_how_a_command_ends(raised, status, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back what a closed one is replaced by

    @cli.command
    def main(argv=None):
        if raised is not None:
            raise raised

    assert main([]) == status
    error = capsys.readouterr().err
    assert error.startswith(said) and len(error) < 300 and error.count("\n") == bool(said)


def test_a_fault_of_ours_keeps_its_traceback():
    @cli.command
    def main(argv=None):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main([])


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (cli.positive_int, {"1": 1, "50": 50}, ["0", "-1", "1.5", "", "x", str(2**63)]),
        (cli.image_side, {"1": 1, "65536": 65536}, ["0", "65537", "1e3"]),
        (cli.seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "1e3"]),
        (cli.finite_float, {"-1.5": -1.5, "5": 5.0}, ["nan", "inf", "", "x"]),
        (cli.non_negative_float, {"0": 0.0, "1e-3": 1e-3}, ["-0.1", "nan", "inf"]),
    ],
)
def test_numbers_are_checked(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_a_line_of_the_log_stands_alone_beside_a_progress_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = cli._Handler(stream)
    with tqdm(total=3, file=stream) as progress:
        progress.update()
        handler.emit(logging.makeLogRecord({"msg": "error: what, where", "levelno": logging.ERROR}))
    lines = stream.getvalue().replace("\r", "\n").splitlines()
    assert "error: what, where" in lines


def test_results_go_to_any_terminal():
    """What its encoding lacks is written as an escape."""
    code = "from ldm import cli; cli.command(lambda argv: cli.say('3 \\xd7 4'))()"
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    done = subprocess.run(command, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, capture_output=True)
    assert done.returncode == 0 and done.stdout.strip() == rb"3 \xd7 4"


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path):
    code = "from ldm import cli; import sys; sys.exit(cli.command(lambda argv: cli.say(10**6 * 'x'))())"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1
