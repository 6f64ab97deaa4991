"""Loggers by one word, and the configuration as hyperparameters."""

import csv
import sys
import types

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from ldm.cli.train import parse
from ldm.errors import UserError
from ldm.training.configuration import make_plan
from ldm.training.loggers import ContinuedCSVLogger, Hyperparameters, build_loggers


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, [(TensorBoardLogger, "tensorboard", "")]),
        ({}, [(TensorBoardLogger, "tensorboard", "")]),
        ("tensorboard", [(TensorBoardLogger, "tensorboard", "")]),
        ("csv", [(ContinuedCSVLogger, "csv", "")]),
        ("csv, tensorboard", [(ContinuedCSVLogger, "csv", ""), (TensorBoardLogger, "tensorboard", "")]),
        (["tensorboard", "csv"], [(TensorBoardLogger, "tensorboard", ""), (ContinuedCSVLogger, "csv", "")]),
        ({"target": "csv", "params": {"name": "mine"}}, [(ContinuedCSVLogger, "mine", "")]),
        ({"params": {"version": "v"}}, [(TensorBoardLogger, "tensorboard", "v")]),
        ({"target": "pytorch_lightning.loggers.CSVLogger"}, [(CSVLogger, "tensorboard", 0)]),
    ],
)
def test_loggers_are_named_by_words_or_targets(section, expected, tmp_path):
    built = build_loggers(section, tmp_path)
    built = built if isinstance(built, list) else [built]
    assert [(type(each), each.name, each.version) for each in built] == expected
    assert all(str(each.save_dir) == str(tmp_path) for each in built)


def test_unknown_word_raises_user_error():
    with pytest.raises(UserError, match=r'^lightning.logger "cvs" is not known \(did you mean "csv"\?\); choose from'):
        build_loggers("tensorboard,cvs", None)


def test_missing_wandb_names_its_extra(tmp_path, monkeypatch):
    import pytorch_lightning.loggers.wandb as lightning_wandb

    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", False)
    with pytest.raises(UserError, match=r'wandb needs a package that is not installed; run pip install .*\[wandb\]"$'):
        build_loggers("wandb", tmp_path)


class WandbRun:
    """Stand-in for a run of wandb, which records what it is given."""

    def __init__(self, options):
        self.options, self.logged, self.config = options, [], types.SimpleNamespace(update=self.set)
        self.values = {}

    def set(self, values, **options):
        self.values.update(values)

    def log(self, metrics, step=None):
        self.logged.append(metrics)


@pytest.fixture
def wandb(monkeypatch):
    """Return the runs of a stand-in for wandb."""
    import pytorch_lightning.loggers.wandb as lightning_wandb

    runs = []
    module = types.ModuleType("wandb")
    module.run = None
    module.Image = lambda image, **options: image
    module.init = lambda **options: runs.append(WandbRun(options)) or runs[-1]
    kinds = {"wandb.sdk": {}, "wandb.sdk.lib": {"RunDisabled": WandbRun}, "wandb.wandb_run": {"Run": WandbRun}}
    for name, values in kinds.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    return runs


class Module(LightningModule):
    def __init__(self, steps=()):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.log("loss", float(self.global_step))
        return self.net(batch).square().mean()


def fit(logger, callbacks=(), max_steps=4, module=None, checkpoint=None):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=logger,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module or Module(), torch.utils.data.DataLoader(torch.ones(2, 1)), ckpt_path=checkpoint)
    return trainer


VALUES = {"model": {"target": "x", "params": {"n": 1}}, "seed": 23, "learning_rate": 0.5}


def test_wandb_gets_values_images_and_the_configuration(wandb, tmp_path, monkeypatch):
    from ldm.training.callbacks import ImageLogger

    monkeypatch.chdir(tmp_path)  # the images
    module = Module()
    module.log_images = lambda batch, split: {"noise": torch.zeros(1, 3, 8, 8)}
    folder = tmp_path / "2026-01-01T00-00-00_a b"
    fit(build_loggers("wandb", folder), [Hyperparameters(VALUES), ImageLogger(1, 2)], 1, module)
    (run,) = wandb
    expected = {"project": "ldm", "name": folder.name, "id": "2026-01-01T00-00-00_a-b", "resume": "allow"}
    assert expected.items() <= run.options.items()
    assert run.options["dir"] == str(folder)
    assert run.values == VALUES
    assert {"loss", "train/noise"} <= {key for metrics in run.logged for key in metrics}


@pytest.mark.parametrize("word", ["csv", "tensorboard"])
def test_configuration_is_logged_as_hyperparameters(word, tmp_path):
    fit(build_loggers(word, tmp_path), [Hyperparameters(VALUES)], 1)
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / word / "hparams.yaml")) == VALUES


def test_hyperparameters_of_an_own_module_are_kept(tmp_path):
    module = Module()
    module.save_hyperparameters({"width": 3})
    fit(build_loggers("csv", tmp_path), [Hyperparameters(VALUES)], 1, module)
    assert OmegaConf.load(tmp_path / "csv" / "hparams.yaml") == {"width": 3}


def rows(folder):
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]


def test_csv_of_a_resumed_run_continues_after_its_checkpoint(tmp_path):
    """Rows that a killed run wrote after its checkpoint are replaced, and an incomplete last row is removed."""
    trainer = fit(build_loggers("csv", tmp_path), max_steps=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(build_loggers("csv", tmp_path), max_steps=5, checkpoint=tmp_path / "two.ckpt")
    complete = rows(tmp_path)
    assert complete == [(step, str(float(step))) for step in range(5)]
    with (tmp_path / "csv" / "metrics.csv").open("a") as file:
        file.write("0")
    fit(build_loggers("csv", tmp_path), max_steps=6, checkpoint=tmp_path / "two.ckpt")
    assert rows(tmp_path) == [*complete, (5, "5.0")]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(words, **lightning):
        section = {"lightning": lightning} if lightning else {}
        config = {"model": {"target": "x"}, "data": {"target": "y"}, **section}
        OmegaConf.save(OmegaConf.create(config), "config.yaml")
        return make_plan(parse(["--base", "config.yaml", "-t", *words])).lightning

    return make


TARGET = {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"name": "mine"}}


@pytest.mark.parametrize(
    ("words", "section", "expected"),
    [
        ([], "csv", "csv"),
        (["--logger", "wandb"], "csv", "wandb"),
        (["--logger", "csv,tensorboard"], TARGET, "csv,tensorboard"),
        (["lightning.logger=csv"], TARGET, "csv"),
        ([], TARGET, TARGET),
    ],
)
def test_command_line_and_configuration_name_the_logger(words, section, expected, plan):
    lightning = plan(words, logger=section)
    assert lightning.logger == expected
    assert "logger" not in lightning.trainer


def test_logger_can_be_disabled(plan):
    assert plan(["--logger", "false"]).trainer.logger is False


@pytest.mark.parametrize(("words", "section"), [(["--logger", "cvs"], {}), ([], "cvs")])
def test_unknown_logger_is_an_error_of_the_plan(words, section, plan):
    with pytest.raises(UserError, match=r'lightning.logger "cvs" is not known \(did you mean "csv"\?\)'):
        plan(words, **({"logger": section} if section else {}))


def test_policy_for_values_that_are_not_finite(plan):
    assert plan(["lightning.non_finite=stop"]).non_finite == "stop"
    with pytest.raises(UserError, match=r'^lightning.non_finite "sotp" is not known \(did you mean "stop"\?\); give'):
        plan(["lightning.non_finite=sotp"])
