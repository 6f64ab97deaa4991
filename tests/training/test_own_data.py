"""Runs with data sets of one's own, and with few batches: errors of one line, and the promised checkpoints."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from tiny_models import class_config, unconditional_config
from torch.utils.data import IterableDataset

import main

QUIET = ["--enable_progress_bar", "false", "--enable_model_summary", "false", "lightning.callbacks.image_logger=null"]


class Items:
    """Data set of `size` items, which the class attribute `item` returns."""

    item = staticmethod(lambda index: {"image": np.full((16, 16, 3), index / 4 - 1, np.float32)})

    def __init__(self, size=6):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.item(index)


class Pixels(Items):
    item = staticmethod(lambda index: {"image": np.zeros((16, 16, 3), np.uint8)})


class Pairs(Items):
    item = staticmethod(lambda index: (np.zeros((16, 16, 3), np.float32), index))


class Sizes(Items):
    item = staticmethod(lambda index: {"image": np.zeros((16 + index, 16, 3), np.float32)})


class Labels(Items):
    item = staticmethod(lambda index: {**Items.item(index), "class_label": 2 * index})


class EmptyStream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return `run(train, *words)`, which trains on a data set of this module and returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def start(train, *words, model=None, validation="Items", workers=0):
        sets = {"train": {"target": f"{__name__}.{train}"}}
        if validation is not None:
            sets["validation"] = {"target": f"{__name__}.{validation}"}
        config = {
            "model": {"base_learning_rate": 1e-4, **(model or unconditional_config(monitor="val/loss"))},
            "data": {
                "target": "main.DataModuleFromConfig",
                "params": {"batch_size": 2, "num_workers": workers, **sets},
            },
        }
        OmegaConf.save(OmegaConf.create(config), "tiny.yaml")
        return main.main(["-b", "tiny.yaml", "-t", "--allow-target", __name__, "--max_epochs", "1", *QUIET, *words])

    return start


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("Pixels", 'data.params.train: "image" is a tensor (2, 16, 16, 3) of uint8; return float32, in [-1, 1], e.g. '),
        (
            "Pairs",
            "data.params.train returns tuples or lists (a batch of a tensor (2, 16, 16, 3) of float32, a ",
        ),
        ("Sizes", 'data.params.train: "image" of an item has the shape ('),
        ("EmptyStream", "data.params.train: EmptyStream returned no item; check its files and filters"),
    ],
)
def test_unsuitable_training_set_is_an_error_of_one_line(train, message, run, capsys):
    assert run(train) == 2
    (error,) = errors(capsys)
    assert error.startswith(f"error: {message}")


def test_unsuitable_validation_set_is_found_before_training(run, capsys):
    assert run("Items", validation="Pixels") == 2
    (error,) = errors(capsys)
    assert error.startswith('error: data.params.validation: "image" is a tensor (2, 16, 16, 3) of uint8')


def test_error_in_a_worker_is_an_error_of_one_line(run, capsys):
    assert run("Sizes", workers=1, validation=None) == 2
    (error,) = errors(capsys)
    assert error.startswith('error: data.params.train: "image" of an item has the shape (')


def test_label_beyond_the_classes_is_an_error_of_one_line(run, capsys):
    assert run("Labels", model=class_config(10), validation=None) == 2
    (error,) = errors(capsys)
    assert error == (
        'error: data.params.train: "class_label" has the value 10; n_classes of the model is 10, which allows 0 to 9'
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--limit_train_batches", "0.01"],
        ["--limit_val_batches", "0.01"],
        ["--limit_val_batches", "0"],
        ["--limit_val_batches", "0", "--val_check_interval", "100"],
        ["--check_val_every_n_epoch", "2"],
    ],
)
def test_small_data_sets_and_runs_without_validation_write_both_checkpoints(words, run, tmp_path):
    assert run("Items", *words) == 0
    names = sorted(path.name for path in tmp_path.glob("logs/*/checkpoints/*"))
    assert names == ["epoch=000000.ckpt", "last.ckpt"]


def test_validation_after_the_end_of_the_epoch_is_an_error_and_writes_nothing(run, tmp_path, capsys):
    assert run("Items", "--val_check_interval", "100") == 2
    (error,) = errors(capsys)
    assert "val_check_interval is 100, and an epoch has 3 batches" in error
    assert not (tmp_path / "logs").exists()


def test_configuration_that_lightning_rejects_later_is_an_error_of_one_line(run, capsys):
    assert run("Items", "lightning.modelcheckpoint.params.monitor=val/lsos") == 2
    (error,) = errors(capsys)
    assert error.startswith("error: Lightning rejects the configuration: ") and "val/lsos" in error
