"""Plan of a run: configurations of a resumed run, and overrides of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
    torch.save({"state_dict": {}}, folder / "checkpoints" / "last.ckpt")
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


# -- layers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path, monkeypatch):
    """Return the names of two configurations; the second one removes the latent cache of the first."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(
        "model: {base_learning_rate: 1.0, target: a.B, params: {x: 1}}\n"
        "data: {target: a.C, params: {batch_size: 8, latent_cache: {variants: 2}}}\n"
        "lightning: {trainer: {max_steps: 5}}\n"
    )
    Path("mine.yaml").write_text("data:\n  params:\n    ~latent_cache:\n    batch_size: 4\n")
    return "base.yaml", "mine.yaml"


def test_a_later_file_removes_keys(layers):
    assert plan("-b", *layers).config.data.params == {"batch_size": 4}


def test_the_command_line_removes_keys(layers):
    for words in (["-b", "base.yaml", "~data.params.latent_cache"], ["~data.params.latent_cache", "-b", "base.yaml"]):
        assert plan(*words).config.data.params == {"batch_size": 8}


def test_null_is_a_value(layers):
    assert plan("-b", "base.yaml", "data.params.latent_cache=null").config.data.params.latent_cache is None


def test_a_section_is_removed(layers):
    assert plan("-b", "base.yaml", "~lightning").lightning == {"trainer": {}}


def test_an_unknown_key_to_remove_is_an_error(layers):
    with pytest.raises(UserError, match=r'no key "data.params.latent_cach" \(did you mean "data.params.latent_cache"'):
        plan("-b", "base.yaml", "~data.params.latent_cach")
    with pytest.raises(UserError, match=r'the command line has an unknown key "dta" \(did you mean "data"'):
        plan("-b", "base.yaml", "~dta")
    Path("wrong.yaml").write_text("~modle:\n")
    with pytest.raises(UserError, match=r'"wrong.yaml" has an unknown key "modle" \(did you mean "model"'):
        plan("-b", "base.yaml", "wrong.yaml")


def test_a_value_that_is_not_yaml_is_named_with_a_remedy(layers):
    words = ("data.params.batch_size=2", "data.params.shards={00000..00001}.tar", "model.params.x=1")
    with pytest.raises(UserError, match=r"^cannot parse data.params.shards=\{00000..00001\}.tar: ") as raised:
        plan("-b", "base.yaml", *words)
    assert str(raised.value).endswith("; write key.sub=value, and braces in a text as 'key.sub=\"{}\"'")
    data = plan("-b", "base.yaml", words[0], 'data.params.shards="{00000..00001}.tar"').config.data.params
    assert (data.batch_size, data.shards) == (2, "{00000..00001}.tar")


def test_removed_keys_are_not_in_the_saved_configuration(run):
    save(run, "2025-01-02T00-00-00", plan("-r", run, "~lightning.trainer.max_steps").lightning.trainer)
    assert plan("-r", run).lightning.trainer == {"gpus": "0,"}


# -- files of the model ---------------------------------------------------------------------------------------------


def test_text_files_beside_a_configuration_are_found(layers, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "names.txt").write_text("fox\n")
    (tmp_path / "set" / "ldm.yaml").write_text("model: {params: {class_names: names.txt}}")
    assert plan("-b", "base.yaml", "set/ldm.yaml").config.model.params.class_names == str(tmp_path / "set/names.txt")
    assert plan("-b", "base.yaml", "model.params.class_names=names.txt").config.model.params.class_names == "names.txt"


def test_weights_of_the_newest_run_are_chosen(layers):
    for time in ("2025-01-02", "2025-01-10"):
        (Path("runs") / f"{time}_first [a]" / "checkpoints").mkdir(parents=True)
        (Path("runs") / f"{time}_first [a]" / "checkpoints" / "last.ckpt").touch()
    (Path("runs") / "2025-02-01_first [a]").mkdir()  # has no checkpoint yet
    key = "model.params.stage.ckpt_path"
    chosen = plan("-b", "base.yaml", f"{key}=runs/*_first [a]/checkpoints/last.ckpt").config.model.params
    assert chosen.stage.ckpt_path == "runs/2025-01-10_first [a]/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=rf'{key} "runs/\*_second/last.ckpt" matches no file; train that model first'):
        plan("-b", "base.yaml", f"{key}=runs/*_second/last.ckpt")


def test_weights_of_a_resumed_run_are_not_searched(run):
    Path("first.yaml").write_text("model: {params: {stage: {ckpt_path: 'gone/*.ckpt'}}}")
    assert plan("-r", run, "-b", "first.yaml").config.model.params.stage.ckpt_path == "gone/*.ckpt"
    with pytest.raises(UserError, match="matches no file"):
        plan("-b", run / "configs/2025-01-01T00-00-00-project.yaml", "first.yaml")
