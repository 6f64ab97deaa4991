"""Tests of `ldm.cli.metadata`: the records in image files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_models import write_model

from ldm.cli import replay
from ldm.cli.metadata import KEY, Record, RunInfo
from ldm.cli.txt2img import main
from ldm.config.model_files import ModelFiles
from ldm.errors import UserError
from ldm.pipelines import generation
from ldm.pipelines.generation import BatchPosition


@pytest.fixture
def entered(monkeypatch):
    """Return a list that collects whether each preparation packs the weights."""
    prepared, found = generation.prepared, []

    def counted(model, packed):
        found.append(packed)
        return prepared(model, packed)

    monkeypatch.setattr(generation, "prepared", counted)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with a model, and with one image each of an unpacked (2 steps) and a packed run (12 steps)."""
    base = tmp_path_factory.mktemp("metadata")
    write_model(base / "tiny")
    for steps in (2, 12):
        options = ["--prompt", "fox", "--seed", "3", "--n_samples", "1", "--skip_grid", "--ddim_steps", str(steps)]
        assert main([*options, "--model", str(base / "tiny"), "--outdir", str(base / str(steps))]) == 0
    return base


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as file:
        return file.text


def write(path: Path, record: object) -> Path:
    info = PngInfo()
    info.add_text(KEY, json.dumps(record))
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    return path


def test_record_holds_everything_that_sampling_again_takes(base):
    record = Record.read(base / "2/samples/0000.png")
    settings = {
        "sampler": "ddim",
        "steps": 2,
        "eta": 0.0,
        "scale": 5.0,
        "timestep_spacing": None,
        "negative_prompt": "",
        "height": 16,
        "width": 16,
    }
    run = record.run
    assert (run.task, run.model, run.precision, dict(run.settings)) == ("txt2img", "tiny", "float32", settings)
    assert (run.config, run.checkpoint) == (str(base / "tiny/config.yaml"), str(base / "tiny/model.ckpt"))
    assert run.version.startswith("ldm ")
    assert record.inputs == {"prompt": "fox"} and record.seed == 3
    assert record.position == BatchPosition(0, 0, 1, packed=False)


def test_files_inside_the_working_folder_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ModelFiles("m", tmp_path / "a/config.yaml", Path("/elsewhere/model.ckpt"))
    run = RunInfo.of("txt2img", files, "float32", {})
    assert (run.config, run.checkpoint) == ("a/config.yaml", "/elsewhere/model.ckpt")


@pytest.mark.parametrize(("steps", "packed"), [(2, False), (12, True)])
def test_packing_is_recorded_and_repeated(base, entered, steps, packed):
    path = base / f"{steps}/samples/0000.png"
    assert json.loads(text_of(path)[KEY])["place"]["packed"] is packed
    assert Record.read(path).position.packed is packed
    assert replay.main([str(path)]) == 0
    assert entered == [packed]


def test_replay_uses_the_recorded_choice(base, entered, tmp_path):
    """Not the one that the length of the run suggests."""
    for steps, packed in ((2, True), (12, False)):
        with Image.open(base / f"{steps}/samples/0000.png") as file:
            record, image = json.loads(file.text[KEY]), np.asarray(file)
        record["place"]["packed"] = packed
        info = PngInfo()
        info.add_text(KEY, json.dumps(record))
        Image.fromarray(image).save(tmp_path / "x.png", pnginfo=info)
        assert replay.main([str(tmp_path / "x.png")]) in (0, 1), "rounding may differ"
        assert entered.pop() is packed


def test_record_is_read_beside_texts_of_other_programs(base, tmp_path):
    with Image.open(base / "2/samples/0000.png") as file:
        info = PngInfo()
        info.add_text("workflow", "x" * (2 << 20), zip=True)  # Pillow refuses compressed texts of more than 1 MB
        for key, text in file.text.items():
            info.add_text(key, text)
        file.save(tmp_path / "x.png", pnginfo=info)
    assert Record.read(tmp_path / "x.png") == Record.read(base / "2/samples/0000.png")
    assert replay.main([str(tmp_path / "x.png")]) == 0


def test_truncated_image_raises_user_error(base, tmp_path):
    content = (base / "2/samples/0000.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[:-300])
    with pytest.raises(UserError, match="give a PNG that a command of this project wrote"):
        Record.read(tmp_path / "x.png")


def test_records_of_earlier_versions_count_as_packed(base, entered, tmp_path):
    record = json.loads(text_of(base / "2/samples/0000.png")[KEY])
    del record["place"]["packed"]
    path = write(tmp_path / "x.png", record)
    assert Record.read(path).position == BatchPosition(0, 0, 1, packed=True)
    assert replay.main([str(path)]) == 1, "the file holds another image"
    assert entered == [True]


def test_settings_of_other_versions_are_ignored(base, tmp_path, capsys):
    record = json.loads(text_of(base / "2/samples/0000.png")[KEY])
    record["settings"]["an_old_name"] = 3
    assert replay.main([str(write(tmp_path / "x.png", record))]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"place": {"index": 0, "position": 2, "batch": 2}}, "the position is outside the batch"),
        ({"place": {"index": 0, "position": 0, "batch": 1, "colour": 3}}, "damaged"),
        ({"seed": -1}, "the seed is not between 0 and"),
        ({"seed": "many"}, "wrong types"),
        ({"precision": "int9"}, 'the precision is "int9"'),
        ({"inputs": []}, "wrong types"),
        ({"colour": "red"}, "damaged"),
    ],
    ids=str,
)
def test_damaged_record_is_one_line(base, tmp_path, change, message):
    record = json.loads(text_of(base / "2/samples/0000.png")[KEY])
    path = write(tmp_path / "x.png", {**record, **change})
    with pytest.raises(UserError, match=message) as raised:
        Record.read(path)
    assert "x.png" in str(raised.value) and "\n" not in str(raised.value)


def test_text_of_a_grid_lists_each_input_once():
    run = RunInfo("txt2img", "m", "c", "w", "float32", "ldm 1", {"steps": 2})
    text = run.sheet_text([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a", "image": "x"}])
    assert text == {"prompt": "a\nb", "image": "x", "steps": 2, "task": "txt2img", "model": "m", "version": "ldm 1"}
