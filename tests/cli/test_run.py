"""Tests of what all sampling commands share, on the command `txt2img` with a tiny model."""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from task_checks import pixels
from tiny_models import write_model

from ldm.cli.run import command_of
from ldm.cli.txt2img import Txt2Img
from ldm.errors import UserError
from ldm.modules.packing import has_packed_weights
from ldm.pipelines import generation
from ldm.pipelines.text import TextToImage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture
def sample(model, tmp_path):
    """Return a function that runs the command with options and an output folder, and returns the images there."""

    def run(folder: str, *options: object, task=None) -> list[np.ndarray]:
        fixed = ["--model", model, "--ddim_steps", 3, "--prompt", "fox", "--outdir", tmp_path / folder]
        assert command_of(task or Txt2Img())([str(each) for each in (*fixed, *options)]) == 0
        return [pixels(path) for path in sorted((tmp_path / folder / "samples").iterdir())]

    return run


@pytest.mark.parametrize("options", [(), ("--ddim_eta", 1), ("--plms",), ("--dpm",)], ids=str)
def test_image_does_not_depend_on_the_batch_size(sample, options):
    alone, threes, eights = (
        sample(f"b{n}", "--n_samples", 8, "--seed", 3, "--batch_size", n, *options) for n in (1, 3, 8)
    )
    for i in range(8):
        assert np.abs(alone[i] - threes[i]).max() <= 1 and np.abs(alone[i] - eights[i]).max() <= 1
    assert (alone[0] != alone[1]).any()


def test_image_i_uses_the_seed_plus_i(sample):
    four = sample("four", "--n_samples", 4, "--batch_size", 1, "--seed", 10)
    (third,) = sample("one", "--n_samples", 1, "--seed", 12)
    assert (four[2] == third).all()


def test_same_command_writes_identical_files(sample, tmp_path):
    for folder in ("a", "b"):
        sample(folder, "--n_samples", 2, "--seed", 1, "--ddim_eta", 0.5)
    for name in ("samples/0000.png", "samples/0001.png", "fox.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class EvenInputs(Txt2Img):
    """Task that cannot read every second input."""

    def inputs(self, args, info):
        return [{**each, "number": i} for i, each in enumerate(super().inputs(args, info))]

    def read(self, inputs, pipeline):
        if inputs["number"] % 2:
            raise UserError(f"number {inputs['number']} is odd")
        return super().read(inputs, pipeline)


def test_unreadable_inputs_do_not_stop_the_others(model, tmp_path, caplog, capsys):
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--n_samples", "5"]
    assert command_of(EvenInputs())(options) == 2
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "number 1 is odd",
        "number 3 is odd",
    ]
    assert capsys.readouterr().err.strip().endswith("error: 2 of 5 failed; see above")
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0002.png", "0004.png"]


def test_errors_of_single_outputs_do_not_stop_the_others(model, tmp_path, monkeypatch, caplog, capsys):
    """One image cannot be saved, another cannot be computed."""
    saved, calls = Image.Image.save, itertools.count()

    def save(self, path, **options):
        if next(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(generation, "generate", FailingThird(generation.generate))
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--n_samples", "5"]
    assert command_of(Txt2Img())(options) == 2
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    path = tmp_path / "samples" / "0001.png"
    assert errors == [f'cannot write "{path}": Invalid argument; choose another place to write to', "image 2 overflows"]
    printed = capsys.readouterr()
    assert printed.err.strip().endswith("error: 2 of 5 failed; see above") and "3 images" in printed.out
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0003.png", "0004.png"]
    (grid,) = tmp_path.glob("*.png")
    assert pixels(grid).shape == (16 + 4, 3 * 18 + 2, 3)


class FailingThird:
    """Form of `generate` whose third image could not be computed."""

    def __init__(self, generate) -> None:
        self.generate = generate

    def __call__(self, *args, **options):
        for sample in self.generate(*args, **options):
            failed = sample.item.index == 2
            yield replace(sample, pixels=None, error=UserError("image 2 overflows")) if failed else sample


def test_interruption_keeps_finished_images(model, tmp_path, monkeypatch, capsys):
    sample = TextToImage.sample
    calls = iter([True, False])

    def interrupted(self, *args):
        if next(calls):
            return sample(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "sample", interrupted)
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--batch_size", "2"]
    assert command_of(Txt2Img())(options) == 130
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0001.png"]
    assert "2 images" in capsys.readouterr().out


def test_full_disk_keeps_finished_images(model, tmp_path, monkeypatch, capsys):
    saved = Image.Image.save
    room = iter([True, True, False, False, False])

    def save(self, path, **options):
        if not next(room):
            raise OSError(28, "No space left on device")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--skip_grid"]
    assert command_of(Txt2Img())(options) == 2
    assert len(list(room)) == 2, "no image is saved after the first that did not fit"
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0001.png"]


def test_first_of_two_errors_is_reported(model, tmp_path, monkeypatch, capsys):
    """On a full disk the grid cannot be written either."""
    saved = Image.Image.save
    room = iter([True])

    def save(self, path, **options):
        if not next(room, False):
            raise OSError(28, "No space left on device")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--batch_size", "1"]
    assert command_of(Txt2Img())(options) == 2
    assert "0001.png" in capsys.readouterr().err.strip().splitlines()[-1]


def test_model_is_prepared_for_each_batch_shape(sample, monkeypatch):
    """Packing suits the shape of a batch; the last bits of a smaller batch must not depend on the batches before it."""
    prepared, entered = generation.prepared, []

    @contextmanager
    def counted(model, packed):
        entered.append(has_packed_weights(model))
        with prepared(model, packed):
            yield

    monkeypatch.setattr(generation, "prepared", counted)
    sample("five", "--n_samples", 5, "--batch_size", 2, "--seed", 1, "--ddim_steps", 12)  # enough to pack
    assert entered == [False, False], "once for the two pairs, once for the remaining image"


def test_image_with_values_that_are_not_finite_is_an_error(model, tmp_path, caplog, capsys):
    options = ["--model", str(model), "--ddim_steps", "3", "--outdir", str(tmp_path), "--scale", "1e30", "--seed", "7"]
    assert command_of(Txt2Img())([*options, "--n_samples", "2", "--skip_grid"]) == 2
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        f"the latents of image {index} (seed {7 + index}) are not finite; "
        "lower the guidance scale or check the weights of the model"
        for index in (0, 1)
    ]
    assert capsys.readouterr().err.strip().endswith("error: 2 of 2 failed; see above")
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_an_error_before_sampling(model, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert command_of(Txt2Img())(["--model", str(model), "--outdir", str(tmp_path / "out")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
