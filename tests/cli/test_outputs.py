"""Runs that write to one folder at the same time, and results that cannot be saved."""

from __future__ import annotations

import argparse
import os
from types import SimpleNamespace

import numpy as np
import pytest
from task_checks import pixels

from ldm.cli.inpaint import Inpaint
from ldm.cli.metadata import RunInfo
from ldm.cli.outputs import ImageFolder, spans
from ldm.cli.reconstruct import Reconstruct
from ldm.cli.superres import Superres
from ldm.cli.txt2img import Txt2Img
from ldm.io import grids
from ldm.pipelines.generation import BatchPosition, Item, Sample

RUN = RunInfo("task", "model", "config.yaml", "model.ckpt", "float32", "ldm 0", {})


class Run:
    """Run of a task without a model; its images are grey, of one level each."""

    def __init__(self, task, outdir, inputs, first_level: int = 0, **args) -> None:
        defaults = {"outdir": str(outdir), "skip_grid": False, "from_file": None, "json": None}
        defaults |= {"n_samples": 2, "n_rows": 0}
        task.panels = lambda sample, pipeline: []
        self.output = ImageFolder(task, argparse.Namespace(**{**defaults, **args}))
        self.output.plan(inputs, 0, 1)
        self.output.open(RUN, SimpleNamespace())
        self.level = first_level

    def save(self, index: int, size: int = 4) -> None:
        image = np.full((size, size, 3), self.level + index, np.uint8)
        self.output.save(Sample(Item(index, index, None), BatchPosition(index), image, None))

    def close(self) -> None:
        self.output.close(1.0, True)


def levels(folder) -> dict[str, int]:
    return {name: int(pixels(folder / name)[0, 0, 0]) for name in sorted(os.listdir(folder)) if name.endswith(".png")}


def test_two_runs_keep_all_images_and_grids(tmp_path, capsys):
    """Both runs choose their first number before either saves an image."""
    prompts = 3 * [{"prompt": "red heart"}]
    one, two = Run(Txt2Img(), tmp_path, prompts), Run(Txt2Img(), tmp_path, prompts, 100)
    for index in range(3):
        one.save(index)
        two.save(index)
    one.close()
    two.close()
    expected = {0: 0, 1: 100, 2: 1, 3: 101, 4: 2, 5: 102}
    assert levels(tmp_path / "samples") == {f"{number:04}.png": level for number, level in expected.items()}
    assert [path.name for path in one.output.paths] == ["0000.png", "0002.png", "0004.png"]
    assert sorted(levels(tmp_path)) == ["red-heart-1.png", "red-heart.png"]
    printed = capsys.readouterr().out
    assert "red-heart-1.png" in printed
    assert f"3 images in 1.0 s: {tmp_path / 'samples' / '0000.png'}, 0002.png, 0004.png\n" in printed


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0007.png"], ["0007.png"]),
        (["0007.png", "0008.png", "0009.png"], ["0007.png to 0009.png"]),
        (["09.png", "10.png", "12.png", "14.png", "15.png"], ["09.png to 10.png", "12.png", "14.png to 15.png"]),
        (["a.png", "b.png", "c.png"], ["a.png to c.png"]),
    ],
)
def test_numbers_with_gaps_are_listed(names, expected):
    assert spans(names) == expected


def test_many_gaps_are_cut(tmp_path, capsys):
    run = Run(Txt2Img(), tmp_path, 30 * [{"prompt": "fox"}])
    for index in range(0, 30, 2):
        run.save(index)
    run.close()
    assert ", 0012.png, 0014.png, …\n" in capsys.readouterr().out


def test_two_runs_of_numbered_grids_keep_both(tmp_path):
    prompts = 2 * [{"prompt": "fox"}]
    runs = [Run(Txt2Img(), tmp_path, prompts, from_file="prompts.txt") for _ in range(2)]
    chosen = [run.output.task.grid_paths(tmp_path, run.output.args, prompts) for run in runs]
    for run, paths in zip(runs, chosen, strict=True):
        run.output.task.grid_paths = lambda *args, paths=paths: paths  # chosen before either grid is written
        run.save(0)
        run.close()
    assert sorted(levels(tmp_path)) == ["grid-0000.png", "grid-0001.png"]


@pytest.mark.parametrize("task", [Superres, Reconstruct])
def test_results_of_an_earlier_run_are_kept(tmp_path, task):
    inputs = [{"name": "x.png" if task is Reconstruct else "x"}]
    for level in (10, 20, 30):
        run = Run(task(), tmp_path, inputs, level)
        run.save(0)
        run.close()
    folder = tmp_path / "images" if task is Reconstruct else tmp_path
    results = {name: level for name, level in levels(folder).items() if name.startswith("x")}
    assert results == {"x.png": 10, "x-1.png": 20, "x-2.png": 30}
    assert len([name for name in os.listdir(tmp_path) if name.startswith("grid")]) == 3


def test_results_of_inpainting_replace_earlier_ones_as_published(tmp_path):
    for level in (10, 20):
        Run(Inpaint(), tmp_path, [{"name": "x"}], level).save(0)
    assert levels(tmp_path) == {"x.png": 20}


def test_grid_of_large_images_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "SHEET_PIXELS", 10_000, raising=False)
    run = Run(Txt2Img(), tmp_path, 9 * [{"prompt": "fox"}], n_samples=3)
    for index in range(9):
        run.save(index, size=100)
    run.close()
    height, width, _ = pixels(tmp_path / "fox.png").shape
    assert height == width == 3 * (31 + 2) + 2
    assert pixels(tmp_path / "samples" / "0008.png").shape == (100, 100, 3)
