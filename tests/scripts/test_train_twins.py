"""Tests of the script `train_twins`: the commands that it runs, and the figures that it prints. No model is trained."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ldm.cli import train

ROOT = Path(__file__).parents[2]


@pytest.fixture
def twins(load_script):
    return load_script("train_twins")


@pytest.fixture
def commands(twins, monkeypatch):
    """Record the commands instead of running them; they write a checkpoint and a falling loss, or scores."""
    from torch.utils.tensorboard import SummaryWriter

    seen = []

    def pretend(words):
        words = [str(word) for word in words[1:]]
        seen.append(words)
        if words[0].endswith("main.py"):
            chosen = train.parse(words[1:])
            folder = Path(chosen.logdir) / f"2000-01-01T00-00-00_{chosen.name}"
            for name in ("checkpoints/last.ckpt", "configs/2000-01-01T00-00-00-project.yaml"):
                (folder / name).parent.mkdir(parents=True)
                (folder / name).touch()
            with SummaryWriter(str(folder / "version_0")) as writer:
                for step, value in enumerate((1.0, 0.5)):
                    writer.add_scalar("train/loss_simple", value, step)
        else:
            scores = [
                {"images": "samples", "value": 71.25, "unit": "%"},
                {"images": "scenes", "value": 100, "unit": "%"},
            ]
            if "restoration" in words[0]:
                scores = [{"method": "bicubic", "psnr": 20.0}, {"method": "last", "psnr": 22.5}]
            Path(words[words.index("--json") + 1]).write_text(json.dumps({"scores": scores}))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("train_demo.subprocess.run", pretend)
    return seen


def test_each_twin_is_trained_and_measured(twins, commands, tmp_path, capsys):
    overrides = ["model.params.channels=16", "~data.params.latent_cache"]
    options = ["layout", "--minutes", "90", "superres", "--n", "8", "--logdir", str(tmp_path), *overrides]
    assert twins.main(options) == 0
    assert len(commands) == 4
    for task, training, measuring in zip(("layout", "superres"), commands[::2], commands[1::2], strict=True):
        chosen = train.parse(training[1:])
        assert [Path(path).name for path in chosen.base] == [f"scenes_{task}.yaml"] and chosen.train
        assert chosen.overrides == overrides
        assert training[training.index("--max_time") + 1] == "00:01:30:00"
        folder = next(tmp_path.glob("*"))
        run = folder / f"2000-01-01T00-00-00_{task}"
        assert measuring[measuring.index("--ckpt") + 1] == str(run / "checkpoints/last.ckpt")
        assert measuring[measuring.index("--config") + 1] == str(run / "configs/2000-01-01T00-00-00-project.yaml")
        assert measuring[measuring.index("--grid") + 1] == str(folder / f"{task}.png")
        assert measuring[measuring.index("--n") + 1] == "8"
    assert Path(commands[1][0]).name == "evaluate_scenes.py" and "--data" not in commands[1]
    assert Path(commands[3][0]).name == "evaluate_restoration.py"
    assert commands[3][commands[3].index("--data") + 1] == "configs/emoji/scenes_superres.yaml"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "layout: train/loss_simple fell: 1.0000 -> 0.5000; samples 71.2 % (scenes 100 %)",
        "superres: train/loss_simple fell: 1.0000 -> 0.5000; 22.5 dB (bicubic 20.0 dB)",
    ]


def test_all_twins_are_the_default(twins, commands, tmp_path):
    assert twins.main(["--logdir", str(tmp_path)]) == 0
    assert len(commands) == 2 * len(twins.TWINS) == 16
    for words in commands[::2]:
        (config,) = train.parse(words[1:]).base
        assert Path(config).is_file()
    for words in commands[1::2]:
        assert (ROOT / "scripts" / Path(words[0]).name).is_file()


def test_an_unknown_twin_is_one_line(twins, capsys):
    assert twins.main(["layuot"]) == 2
    assert 'there is no twin "layuot" (did you mean "layout"' in capsys.readouterr().err
