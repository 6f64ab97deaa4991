"""What holds for every task, checked on its command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.tasks.run import command_of
from ldm.tasks.task import Task


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file).astype(int)


def samples(folder: Path) -> list[Path]:
    return sorted((folder / "samples").iterdir())


def assert_same_at_every_batch_size(task: Task, options: Sequence[object], folder: Path) -> None:
    """Draw the same pictures one, three and eight at once."""
    drawn = []
    for size in (1, 3, 8):
        out = folder / f"batches of {size}"
        words = [*options, "--batch_size", size, "--seed", 4, "--outdir", out, "--skip_grid"]
        assert command_of(task)([str(word) for word in words]) == 0
        drawn.append([pixels(path) for path in samples(out)])
    assert len(drawn[0]) == len(drawn[1]) == len(drawn[2]) >= 4
    for alone, threes, eights in zip(*drawn, strict=True):
        assert np.abs(alone - threes).max() <= 1 and np.abs(alone - eights).max() <= 1


def assert_replays(replay: Callable[[list[str]], int], folder: Path) -> None:
    """Draw every picture in a folder again."""
    assert replay([str(path) for path in samples(folder)]) == 0


def assert_one_line(status: int, error: str, message: str) -> None:
    """A command ended with exit status 2 and one line."""
    assert status == 2
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line, line
    assert "Traceback" not in error
