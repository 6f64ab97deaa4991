"""Access to the files of a run of `sample_diffusion`."""

from __future__ import annotations

import numpy as np
from task_checks import pixels


def only(paths):
    """Return the only one of the paths."""
    (found,) = paths
    return found


def run_of(tmp_path, model="faces"):
    """Return the folder of the only run of a model."""
    return only((tmp_path / model / "samples").glob("*/*"))


def samples(folder) -> list[np.ndarray]:
    """Return the samples of a run."""
    return [pixels(path) for path in sorted((folder / "img").glob("*.png"))]


def array(folder) -> dict[str, np.ndarray]:
    """Return the arrays in the file of all samples."""
    with np.load(only((folder / "numpy").iterdir()), allow_pickle=False) as file:
        return dict(file)


def same(one, other) -> bool:
    """Return whether two lists of samples are equal."""
    return len(one) == len(other) and all((a == b).all() for a, b in zip(one, other, strict=True))
