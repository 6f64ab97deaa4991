"""Plan of a run: configurations of a resumed run, and overrides of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from ldm.cli import train
from ldm.errors import UserError
from ldm.training import options
from ldm.training.configuration import make_plan
from ldm.training.run_folder import save_configuration

MODEL = {"base_learning_rate": 1.0, "target": "a.B", "params": {"first_stage": {"params": {"ckpt_path": "first.ckpt"}}}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return the folder of a run with a checkpoint and a saved configuration."""
    monkeypatch.chdir(tmp_path)
    folder = Path("logs/run")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    save(folder, "2025-01-01T00-00-00", {"gpus": "0,", "max_steps": 5})
    return folder


def save(folder, now, trainer, **saved_options):
    parts = {"project": {"model": MODEL, "data": {}}, "lightning": {"lightning": {"trainer": trainer}}}
    if saved_options:
        parts["options"] = {"options": saved_options}
    save_configuration(folder / "configs", now, parts)


def plan(*words):
    return make_plan(train.parse(["-t", *map(str, words)]))


def test_devices_of_the_newest_configuration_are_used(run):
    assert plan("-r", run).lightning.trainer == {"gpus": "0,", "max_steps": 5}
    save(run, "2025-01-02T00-00-00", plan("-r", run, "--accelerator", "cpu").lightning.trainer)
    assert plan("-r", run).lightning.trainer == {"accelerator": "cpu", "max_steps": 5}
    save(run, "2025-01-03T00-00-00", plan("-r", run, "--gpus", "1,").lightning.trainer)
    assert plan("-r", run).lightning.trainer == {"gpus": "1,", "max_steps": 5}


def test_devices_as_override_or_in_a_later_file_replace_saved_ones(run):
    trainer = plan("-r", run, "lightning.trainer.accelerator=cpu").lightning.trainer
    assert trainer == {"accelerator": "cpu", "max_steps": 5}
    Path("cpu.yaml").write_text("lightning: {trainer: {accelerator: cpu}}")
    assert plan("-r", run, "-b", "cpu.yaml").lightning.trainer == trainer


def test_options_of_the_run_are_kept(run):
    assert plan("-r", run).options == {"seed": 23, "scale_lr": True}
    save(run, "2025-01-02T00-00-00", {}, seed=5, scale_lr=False)
    assert plan("-r", run).options == {"seed": 5, "scale_lr": False}
    assert plan("-r", run, "--scale_lr", "true", "-s", "5").options == {"seed": 5, "scale_lr": True}


def test_another_seed_for_a_resumed_run_is_an_error(run):
    save(run, "2025-01-02T00-00-00", {}, seed=5, scale_lr=True)
    with pytest.raises(UserError, match=r"--seed 6 has no effect on a resumed run, .* seed 5; leave out --seed"):
        plan("-r", run, "-s", "6")


@pytest.mark.parametrize("content", ["options: {seed: many}", "options: {sede: 1}", "options: 3", "seed: 1"])
def test_damaged_options_are_an_error(run, content):
    (run / "configs" / "2025-01-02T00-00-00-options.yaml").write_text(content)
    with pytest.raises(UserError, match=r"options|seed"):
        plan("-r", run)


def test_other_initial_weights_for_a_resumed_run_are_an_error(run):
    key = "model.params.first_stage.params.ckpt_path"
    assert plan("-r", run, f"{key}=first.ckpt").checkpoint == run / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=f"{key} has no effect on a resumed run"):
        plan("-r", run, f"{key}=second.ckpt")
    with pytest.raises(UserError, match=r"model\.params\.ckpt_path has no effect on a resumed run"):
        plan("-r", run, "model.params.ckpt_path=second.ckpt")


def test_neither_training_nor_test_is_an_error(run):
    with pytest.raises(UserError, match="there is nothing to do"):
        make_plan(train.parse(["-r", str(run), "--no-test"]))


@pytest.mark.parametrize("name", ["lr=1e-4.yaml", "lr.v1=2.yaml", "runs/lr=1e-4/config.yaml", "lr.v1=2"])
def test_configuration_whose_name_contains_an_equals_sign_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": MODEL, "data": {}}), name)
    assert plan("-b", name, "data.x=1").config == {"model": MODEL, "data": {"x": 1}}


def test_missing_configuration_whose_name_contains_an_equals_sign_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'there is no configuration "runs/lr=1/config\.yaml"'):
        plan("-b", "runs/lr=1/config.yaml")


@pytest.mark.parametrize("option", ["-n", "--name", "-p", "-f", "-l", "--default_root_dir"])
def test_value_of_an_option_is_not_an_override(option, run):
    args = train.parse(["-b", "x.yaml", option, "v1.0=best", "model.x=1"])
    assert "v1.0=best" in vars(args).values() or args.trainer == {"default_root_dir": "v1.0=best"}
    assert args.overrides == ["model.x=1"]


def test_unlisted_argument_of_the_installed_trainer_is_accepted(run, monkeypatch):
    listed = tuple(name for name in options.TRAINER_OPTIONS if name != "benchmark")
    monkeypatch.setattr(options, "TRAINER_OPTIONS", listed)
    assert plan("-r", run, "lightning.trainer.benchmark=true").lightning.trainer.benchmark is True
    with pytest.raises(UserError, match=r'unknown key "benchmrak" \(did you mean "benchmark"\?\)'):
        plan("-r", run, "lightning.trainer.benchmrak=true")


def test_missing_lightning_is_an_error(monkeypatch):
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="training needs Lightning; install it with pip install"):
        options.check_lightning()
