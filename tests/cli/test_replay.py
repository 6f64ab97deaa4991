"""Tests of the command `replay`."""

from __future__ import annotations

import errno
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_models import write_model

from ldm.cli.replay import main as replay
from ldm.cli.txt2img import main as txt2img
from ldm.models.diffusion.ddpm import LatentDiffusion


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Return a folder with four images, sampled in batches of three and one."""
    base = tmp_path_factory.mktemp("replay")
    write_model(base / "tiny")
    options = ["--prompt", "fox 🚀", "--negative_prompt", "rainbow", "--ddim_steps", "3", "--ddim_eta", "0.5"]
    options += ["--batch_size", "3", "--seed", "5", "--model", str(base / "tiny"), "--outdir", str(base)]
    assert txt2img(options) == 0
    return base


def test_images_are_identical(sampled, capsys):
    paths = [str(sampled / f"samples/{i:04}.png") for i in range(4)]
    assert replay([*paths, "--outdir", str(sampled / "again")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: identical" for path in paths]
    for path in paths:
        again = sampled / "again" / path.rpartition("/")[2]
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(again))).all()
        assert Image.open(path).text == Image.open(again).text


def test_new_images_replace_nothing(sampled, tmp_path, caplog):
    """Neither the images to compare with, nor each other."""
    folders = [tmp_path / name for name in ("one", "two")]
    for index, folder in enumerate(folders):
        folder.mkdir()
        shutil.copy(sampled / f"samples/{index:04}.png", folder / "x.png")
    before = (folders[0] / "x.png").read_bytes()
    with caplog.at_level("INFO", logger="ldm"):
        assert replay([*(str(folder / "x.png") for folder in folders), "--outdir", str(folders[0])]) == 0
    assert (folders[0] / "x.png").read_bytes() == before
    for name, original in (("x-1.png", folders[0]), ("x-2.png", folders[1])):
        assert Image.open(folders[0] / name).text == Image.open(original / "x.png").text
        assert f'"{folders[0] / "x.png"}" exists; the new image is "{name}"' in caplog.text


def test_image_that_cannot_be_written_does_not_stop_the_others(sampled, tmp_path, monkeypatch, caplog, capsys):
    saved, calls = Image.Image.save, itertools.count()

    def save(self, path, **options):
        if next(calls) == 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        saved(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    paths = [str(sampled / f"samples/{i:04}.png") for i in range(2)]
    assert replay([*paths, "--outdir", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["0001.png"]
    assert "0000.png" in caplog.text
    assert capsys.readouterr().err.strip().endswith("error: 1 of 2 could not be sampled again; see above")


def test_differences_are_counted(sampled, tmp_path, capsys):
    with Image.open(sampled / "samples/0000.png") as file:
        info = PngInfo()
        info.add_text("ldm", file.text["ldm"])
        image = np.array(file)
    image[0, :2, 0] ^= 4
    Image.fromarray(image).save(tmp_path / "x.png", pnginfo=info)
    assert replay([str(tmp_path / "x.png")]) == 1
    assert capsys.readouterr().out.strip().endswith("x.png: DIFFERENT in 2 of 256 pixels, by 4/255 at most")


def test_grid_is_skipped_among_other_images(sampled, capsys, caplog):
    """In-painting and super-resolution write their grid beside the results."""
    (grid,) = sampled.glob("*.png")
    with caplog.at_level("INFO", logger="ldm"):
        assert replay([str(grid), str(sampled / "samples/0000.png")]) == 0
    assert f'skipped: "{grid}" is a grid; give a single image' in caplog.text
    assert capsys.readouterr().out.strip().endswith("0000.png: identical")
    assert replay([str(grid)]) == 2
    assert "is a grid; give a single image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no image"),
        (lambda path: path.write_text("x"), "cannot read the image"),
        (lambda path: Image.new("RGB", (2, 2)).save(path), "has no settings"),
        (lambda path: with_text(path, "{"), "damaged"),
        (lambda path: with_text(path, '{"inputs": {}, "seed": 1}'), "damaged"),
        (lambda path: with_text(path, "[]"), "damaged"),
    ],
)
def test_an_unusable_image_is_one_line(tmp_path, capsys, make, message):
    make(tmp_path / "x.png")
    assert replay([str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "damaged"),
        ({"inputs": {}}, "damaged"),
        ({"seed": 2**70}, "the seed is not between"),
        ({"precision": "int9"}, 'the precision is "int9"'),
    ],
    ids=str,
)
def test_a_changed_record_is_one_line(sampled, tmp_path, capsys, change, message):
    with Image.open(sampled / "samples/0000.png") as file:
        record = json.loads(file.text["ldm"])
    with_text(tmp_path / "x.png", json.dumps({**record, **change}))
    assert replay([str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_an_unusable_image_does_not_stop_the_others(sampled, tmp_path, capsys, caplog):
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    good = str(sampled / "samples/0003.png")
    assert replay([str(tmp_path / "plain.png"), good, str(tmp_path / "none.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"{good}: identical"]
    assert "2 of 3 could not be sampled again" in printed.err
    assert "has no settings" in caplog.text and "there is no image" in caplog.text


def with_text(path, text):
    info = PngInfo()
    info.add_text("ldm", text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)


def test_a_missing_model_is_named(sampled, tmp_path, capsys):
    (sampled / "tiny").rename(tmp_path / "moved")
    try:
        assert replay([str(sampled / "samples/0000.png")]) == 2
        assert "name it with --model or --ckpt" in capsys.readouterr().err
        assert replay([str(sampled / "samples/0000.png"), "--model", str(tmp_path / "moved")]) == 0
    finally:
        (tmp_path / "moved").rename(sampled / "tiny")


def test_image_that_cannot_be_computed_is_one_line(sampled, monkeypatch, capsys):
    path = sampled / "samples/0000.png"
    decode = LatentDiffusion.decode_first_stage
    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", lambda self, z: decode(self, z) * float("nan"))
    assert replay([str(path)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "error: the pixels of image 0 (seed 5) are not finite; check the weights of the model"
