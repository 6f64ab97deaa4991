"""Checks that apply to the command of every task."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.cli.run import command_of
from ldm.cli.task import Task


def pixels(path: Path) -> np.ndarray:
    """Return the pixels of an image file, (H, W, C) int64."""
    with Image.open(path) as file:
        return np.asarray(file).astype(int)


def samples(folder: Path) -> list[Path]:
    """Return the image files that a command wrote to `folder`."""
    return sorted((folder / "samples").iterdir())


def assert_same_at_every_batch_size(task: Task, options: Sequence[object], folder: Path) -> None:
    """Assert that batch sizes of one, three and eight sample the same images."""
    runs = []
    for size in (1, 3, 8):
        out = folder / f"batches of {size}"
        words = [*options, "--batch_size", size, "--seed", 4, "--outdir", out, "--skip_grid"]
        assert command_of(task)([str(word) for word in words]) == 0
        runs.append([pixels(path) for path in samples(out)])
    assert len(runs[0]) == len(runs[1]) == len(runs[2]) >= 4
    for alone, threes, eights in zip(*runs, strict=True):
        assert np.abs(alone - threes).max() <= 1 and np.abs(alone - eights).max() <= 1


def assert_replays(replay: Callable[[list[str]], int], folder: Path) -> None:
    """Assert that `replay` samples every image in `folder` identically again."""
    assert replay([str(path) for path in samples(folder)]) == 0


def assert_one_line(status: int, error: str, message: str) -> None:
    """Assert that a command ended with exit status 2 and one line."""
    assert status == 2
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line, line
    assert "Traceback" not in error


RUN_WITHOUT_TORCH = """
import sys
from ldm.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
loaded = {"torch", "numpy", "PIL", "transformers"} & set(sys.modules)
sys.exit(f"imported {loaded}" if loaded else status)
"""


def run_without_torch(*words: object, cwd: Path | None = None) -> tuple[int, str]:
    """Run `ldm` in a new process, which must not import torch; return its exit status and its stderr."""
    command = [sys.executable, "-c", RUN_WITHOUT_TORCH, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert "imported" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr
