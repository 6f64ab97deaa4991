"""What every command that draws shares, seen on text to image with a tiny model."""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_model

from ldm import inference
from ldm.errors import UserError
from ldm.modules.packing import has_stand_ins
from ldm.tasks.run import command_of
from ldm.tasks.text2img import TextToImage


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture
def draw(model, tmp_path):
    """Run the command with options, into a folder of that name; gives the pictures in it."""

    def run(folder: str, *options: object, task=None) -> list[np.ndarray]:
        fixed = ["--model", model, "--ddim_steps", 3, "--prompt", "fox", "--outdir", tmp_path / folder]
        assert command_of(task or TextToImage())([str(each) for each in (*fixed, *options)]) == 0
        return [pixels(path) for path in sorted((tmp_path / folder / "samples").iterdir())]

    return run


def pixels(path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(file).astype(int)


@pytest.mark.parametrize("options", [(), ("--ddim_eta", 1), ("--plms",), ("--dpm",)], ids=str)
def test_a_picture_is_the_same_at_every_batch_size(draw, options):
    alone, threes, eights = (
        draw(f"b{n}", "--n_samples", 8, "--seed", 3, "--batch_size", n, *options) for n in (1, 3, 8)
    )
    for i in range(8):
        assert np.abs(alone[i] - threes[i]).max() <= 1 and np.abs(alone[i] - eights[i]).max() <= 1
    assert (alone[0] != alone[1]).any()


def test_picture_i_has_the_seed_s_plus_i(draw):
    four = draw("four", "--n_samples", 4, "--batch_size", 1, "--seed", 10)
    (third,) = draw("one", "--n_samples", 1, "--seed", 12)
    assert (four[2] == third).all()


def test_the_same_command_twice_gives_identical_files(draw, tmp_path):
    for folder in ("a", "b"):
        draw(folder, "--n_samples", 2, "--seed", 1, "--ddim_eta", 0.5)
    for name in ("samples/0000.png", "samples/0001.png", "fox.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Picky(TextToImage):
    """Cannot read every second input."""

    def inputs(self, args, files):
        return [{**each, "number": i} for i, each in enumerate(super().inputs(args, files))]

    def load(self, inputs, settings):
        if inputs["number"] % 2:
            raise UserError(f"number {inputs['number']} is odd")
        return inputs


def test_what_cannot_be_read_does_not_stop_the_rest(model, tmp_path, caplog, capsys):
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--n_samples", "5"]
    assert command_of(Picky())(options) == 2
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "number 1 is odd",
        "number 3 is odd",
    ]
    assert capsys.readouterr().err.strip().endswith("error: 2 of 5 could not be drawn; see above")
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0002.png", "0004.png"]


def test_an_interruption_keeps_what_is_finished(model, tmp_path, monkeypatch, capsys):
    drawn = TextToImage.draw
    calls = iter([True, False])

    def interrupted(self, *args):
        if next(calls):
            return drawn(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "draw", interrupted)
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--batch_size", "2"]
    assert command_of(TextToImage())(options) == 130
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0001.png"]
    assert "2 pictures" in capsys.readouterr().out


def test_a_full_disk_keeps_what_is_finished(model, tmp_path, monkeypatch, capsys):
    saved = Image.Image.save
    room = iter([True, True, False, False, False])

    def save(self, path, **options):
        if not next(room):
            raise OSError(28, "No space left on device")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--skip_grid"]
    assert command_of(TextToImage())(options) == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000.png", "0001.png"]


def test_of_two_errors_the_first_is_told(model, tmp_path, monkeypatch, capsys):
    """On a full disk the sheet cannot be written either."""
    saved = Image.Image.save
    room = iter([True])

    def save(self, path, **options):
        if not next(room, False):
            raise OSError(28, "No space left on device")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    options = ["--model", str(model), "--ddim_steps", "2", "--outdir", str(tmp_path), "--batch_size", "1"]
    assert command_of(TextToImage())(options) == 2
    assert "0001.png" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_batch_is_drawn_as_if_it_were_the_first(draw, monkeypatch):
    """Weights are packed as suits a batch; the last bits of a smaller one must not tell what came before it."""
    prepared, entered = inference.prepared, []

    @contextmanager
    def counted(model):
        entered.append(has_stand_ins(model))
        with prepared(model):
            yield

    monkeypatch.setattr(inference, "prepared", counted)
    draw("five", "--n_samples", 5, "--batch_size", 2, "--seed", 1)
    assert entered.count(False) == 2, "once for the two pairs, once for the one that is left"


def test_numbers_beyond_all_bounds_are_told(draw, caplog):
    draw("huge", "--n_samples", 1, "--scale", 1e30, "--seed", 1)
    assert "lower the guidance scale" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told_before_drawing(model, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert command_of(TextToImage())(["--model", str(model), "--outdir", str(tmp_path / "out")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


@pytest.fixture
def loaded(model):
    return inference.load_model(model / "config.yaml", model / "model.ckpt")


def test_decoding_falls_back_to_single_pictures_and_tiles(loaded, monkeypatch, caplog):
    """A decoder with little memory gives nearly what one with enough gives, and says how."""
    latents = torch.randn(2, 3, 24, 40)
    whole = inference.decode(loaded, latents)
    decode_first_stage = loaded.decode_first_stage
    sizes = []

    def little_memory(z):
        sizes.append(tuple(z.shape))
        if z.numel() > 3 * 16 * 16:
            raise RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 1 bytes")
        return decode_first_stage(z)

    monkeypatch.setattr(loaded, "decode_first_stage", little_memory)
    tiled = inference.decode(loaded, latents)
    assert sizes[:3] == [(2, 3, 24, 40), (1, 3, 24, 40), (1, 3, 24, 32)]
    assert "decoding tiles of 16 × 16 latents" in caplog.text
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.25 * whole.std()


def test_other_errors_of_decoding_are_not_hidden(loaded, monkeypatch):
    def broken(z):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(loaded, "decode_first_stage", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        inference.decode(loaded, torch.randn(2, 3, 8, 8))
