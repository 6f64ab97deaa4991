"""Tests of the script `train_demo`: the commands that it runs, and its check of the losses.

Continuous integration runs the whole script (`make train-demo`); no model is trained here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ldm.cli import export_model, train, txt2img
from ldm.errors import UserError


@pytest.fixture
def train_demo(load_script):
    return load_script("train_demo")


def write_log(folder: Path, name: str, values: list[float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "version_0")) as writer:
        for step, value in enumerate(values):
            writer.add_scalar(name, value, step)


def test_a_falling_loss(train_demo, tmp_path):
    write_log(tmp_path, "train/rec_loss_step", [4.0, 2.0, *[1.5] * 16, 0.5, 0.25])
    curve = train_demo.curve(tmp_path, "train/rec_loss")
    assert (curve.first, curve.last) == (3.0, 0.375)
    assert curve.fell
    assert str(curve) == "train/rec_loss fell: 3.0000 -> 0.3750"


@pytest.mark.parametrize("last", [1.0, 2.0, float("nan")])
def test_a_loss_that_did_not_fall(train_demo, tmp_path, last):
    write_log(tmp_path, "train/loss_simple", [1.0, 0.1, last])
    assert not train_demo.curve(tmp_path, "train/loss_simple").fell


def test_long_logs_are_read_completely(train_demo, tmp_path):
    """By default the reader of TensorBoard keeps a random 10,000 values."""
    write_log(tmp_path, "train/loss_simple", [float(i) for i in range(10_050)])
    assert train_demo.logged(tmp_path, "train/loss_simple") == [float(i) for i in range(10_050)]


def test_missing_values_raise_user_error(train_demo, tmp_path):
    write_log(tmp_path, "train/other", [1.0, 0.5])
    with pytest.raises(UserError, match="too few logged values of train/loss_simple"):
        train_demo.curve(tmp_path, "train/loss_simple")


@pytest.fixture
def commands(train_demo, monkeypatch):
    """Record the commands instead of running them; training commands write a checkpoint and a falling loss."""
    seen = []

    def pretend(words):
        seen.append([str(word) for word in words[1:]])
        if Path(words[1]).name == "main.py":
            chosen = train.parse(words[2:])
            run = Path(chosen.logdir) / f"2000-01-01T00-00-00_{chosen.name}"
            (run / "checkpoints").mkdir(parents=True)
            (run / "checkpoints" / "last.ckpt").touch()
            loss = "train/loss_simple" if chosen.name == "ldm" else "train/rec_loss"
            write_log(run, loss, [1.0, 0.5])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(train_demo.subprocess, "run", pretend)
    return seen


def test_each_result_is_passed_to_the_next_command(train_demo, commands, tmp_path):
    curves = train_demo.train_and_sample(train_demo.DEMO, tmp_path)
    assert [curve.fell for curve in curves] == [True, True]
    first, second, export, sample = commands

    first_checkpoint = tmp_path / "2000-01-01T00-00-00_first_stage" / "checkpoints" / "last.ckpt"
    assert train.parse(first[1:]).overrides == []
    overrides = train.parse(second[1:]).overrides
    assert overrides == [f"model.params.first_stage_config.params.ckpt_path={first_checkpoint}"]
    for training in (first, second):
        chosen = train.parse(training[1:])
        assert chosen.train
        assert all(Path(config).is_file() for config in chosen.base)

    exported = export_model.make_parser().parse_args(export[1:])
    assert Path(exported.ckpt) == tmp_path / "2000-01-01T00-00-00_ldm" / "checkpoints" / "last.ckpt"
    sampled = txt2img.Txt2Img().parse(sample[1:])
    assert sampled.model == exported.outdir
    assert Path(sampled.from_file).is_file()


def test_the_full_model_trains_its_first_stage_in_four_stages(train_demo, commands, tmp_path):
    train_demo.train_and_sample(train_demo.FULL, tmp_path)
    crops, whole, f8, decoder, ldm = (train.parse(command[1:]) for command in commands[:5])
    assert whole.base[0] == crops.base[0]

    def checkpoint(name):
        return f"{tmp_path}/2000-01-01T00-00-00_{name}/checkpoints/last.ckpt"

    assert whole.overrides == [f"model.params.ckpt_path={checkpoint('crops')}"]
    assert f8.overrides == [f"model.params.ckpt_path={checkpoint('whole')}"]
    assert decoder.overrides == [f"model.params.ckpt_path={checkpoint('f8')}"]
    assert ldm.overrides == [f"model.params.first_stage_config.params.ckpt_path={checkpoint('decoder')}"]
    assert all(Path(config).is_file() for chosen in (crops, whole, f8, decoder, ldm) for config in chosen.base)


def test_a_failing_stage_stops_the_script(train_demo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_demo.subprocess, "run", lambda words: subprocess.CompletedProcess(words, 2))
    assert train_demo.main(["--logdir", str(tmp_path)]) == 2
    assert "error: train first_stage stopped with status 2" in capsys.readouterr().err


def test_the_status_is_1_unless_every_loss_fell(train_demo, monkeypatch, tmp_path, capsys):
    fell, rose = train_demo.Curve("a", 2.0, 1.0), train_demo.Curve("b", 1.0, 2.0)
    monkeypatch.setattr(train_demo, "train_and_sample", lambda stages, folder: [fell, rose])
    assert train_demo.main(["--logdir", str(tmp_path)]) == 1
    assert "b DID NOT FALL: 1.0000 -> 2.0000" in capsys.readouterr().out
    monkeypatch.setattr(train_demo, "train_and_sample", lambda stages, folder: [fell, fell])
    assert train_demo.main(["--logdir", str(tmp_path)]) == 0
