"""Drawing a picture again from its metadata."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_models import write_model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, load_script):
    """A folder with four pictures in batches of three and one."""
    base = tmp_path_factory.mktemp("replay")
    write_model(base / "tiny")
    options = ["--prompt", "fox 🚀", "--negative_prompt", "rainbow", "--ddim_steps", "3", "--ddim_eta", "0.5"]
    options += ["--batch_size", "3", "--seed", "5", "--model", str(base / "tiny"), "--outdir", str(base)]
    assert load_script("txt2img").main(options) == 0
    return base


@pytest.fixture(scope="module")
def replay(load_script):
    return load_script("replay").main


def test_pictures_are_drawn_again_bit_for_bit(replay, drawn, capsys):
    paths = [str(drawn / f"samples/{i:04}.png") for i in range(4)]
    assert replay([*paths, "--outdir", str(drawn / "again")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: identical" for path in paths]
    for path in paths:
        again = drawn / "again" / path.rpartition("/")[2]
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(again))).all()
        assert Image.open(path).text == Image.open(again).text


def test_a_difference_is_counted(replay, drawn, tmp_path, capsys):
    with Image.open(drawn / "samples/0000.png") as file:
        info = PngInfo()
        info.add_text("ldm", file.text["ldm"])
        image = np.array(file)
    image[0, :2, 0] ^= 4
    Image.fromarray(image).save(tmp_path / "x.png", pnginfo=info)
    assert replay([str(tmp_path / "x.png")]) == 1
    assert capsys.readouterr().out.strip().endswith("x.png: DIFFERENT in 2 of 256 pixels, by 4/255 at most")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no picture"),
        (lambda path: path.write_text("x"), "cannot read the picture"),
        (lambda path: Image.new("RGB", (2, 2)).save(path), "does not say how it was drawn"),
        (lambda path: with_text(path, "{"), "damaged"),
        (lambda path: with_text(path, '{"inputs": {}, "seed": 1}'), "damaged"),
        (lambda path: with_text(path, "[]"), "damaged"),
    ],
)
def test_a_bad_picture_is_one_line(replay, tmp_path, capsys, make, message):
    make(tmp_path / "x.png")
    assert replay([str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "damaged"),
        ({"inputs": {}}, "damaged"),
        ({"seed": 2**70}, "its seed is not between"),
        ({"precision": "int9"}, 'its precision is "int9"'),
    ],
    ids=str,
)
def test_a_changed_record_is_one_line(replay, drawn, tmp_path, capsys, change, message):
    with Image.open(drawn / "samples/0000.png") as file:
        record = json.loads(file.text["ldm"])
    with_text(tmp_path / "x.png", json.dumps({**record, **change}))
    assert replay([str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_bad_picture_does_not_stop_the_others(replay, drawn, tmp_path, capsys, caplog):
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    good = str(drawn / "samples/0003.png")
    assert replay([str(tmp_path / "plain.png"), good, str(tmp_path / "none.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [f"{good}: identical"]
    assert "2 of 3 could not be drawn again" in printed.err
    assert "does not say how it was drawn" in caplog.text and "there is no picture" in caplog.text


def with_text(path, text):
    info = PngInfo()
    info.add_text("ldm", text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)


def test_a_lost_model_is_named(replay, drawn, tmp_path, capsys):
    (drawn / "tiny").rename(tmp_path / "moved")
    try:
        assert replay([str(drawn / "samples/0000.png")]) == 2
        assert "name it with --model or --ckpt" in capsys.readouterr().err
        assert replay([str(drawn / "samples/0000.png"), "--model", str(tmp_path / "moved")]) == 0
    finally:
        (tmp_path / "moved").rename(drawn / "tiny")
