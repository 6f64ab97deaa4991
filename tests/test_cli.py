"""How commands end, and what their options accept."""

from __future__ import annotations

import argparse

import pytest
import torch

from ldm import cli
from ldm.util import UserError


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (UserError("what, where, what to do"), 2, "error: what, where, what to do"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "error: out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
    ],
)
def test_how_a_command_ends(raised, status, said, capsys):
    @cli.command
    def main(argv=None):
        if raised is not None:
            raise raised

    assert main([]) == status
    assert capsys.readouterr().err.startswith(said)


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
