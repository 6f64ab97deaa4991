"""Limits of the Trainer for data sets of few batches and for streams."""

import pytest
from torch.utils.data import IterableDataset

from ldm.errors import UserError
from ldm.training.data import DataModuleFromConfig
from ldm.training.limits import apply_limits, batch_count, validates


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(6))


def module(train=6, validation=6, stream=False, batch_size=2):
    """Return a data module with sets of these sizes; None for no validation set."""
    sets = {"train": Stream() if stream else range(train)}
    if validation is not None:
        sets["validation"] = range(validation)
    data = DataModuleFromConfig(batch_size, num_workers=0, **{name: {"target": "unused"} for name in sets})
    data.datasets = sets
    return data


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("limit_train_batches", 0.01, 1),
        ("limit_train_batches", 0.4, 0.4),
        ("limit_train_batches", 2, 2),
        ("limit_train_batches", 0, 0),
        ("limit_train_batches", 1.0, 1.0),
        ("limit_val_batches", 0.01, 1),
        ("limit_val_batches", 0.0, 0.0),
        ("overfit_batches", 0.01, 1),
        ("overfit_batches", 0.0, 0.0),
    ],
)
def test_share_of_less_than_one_batch_is_one_batch(option, value, expected):
    settings = {option: value}
    apply_limits(settings, module(), replicas=1)
    assert settings == {option: expected} and type(settings[option]) is type(expected)


def test_processes_share_the_batches():
    assert batch_count(module(train=10), "train", replicas=1) == 5
    assert batch_count(module(train=10), "train", replicas=2) == 3
    settings = {"limit_train_batches": 0.3}
    apply_limits(settings, module(train=10), replicas=2)
    assert settings == {"limit_train_batches": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"val_check_interval": 4},
        {"val_check_interval": 3, "limit_train_batches": 2},
        {"val_check_interval": 2, "limit_train_batches": 0.5},
        {"val_check_interval": 2, "overfit_batches": 1},
    ],
)
def test_validation_after_the_end_of_the_epoch_raises_user_error(settings):
    count = {4: 3, 3: 2, 2: 1}[settings["val_check_interval"]]
    message = rf"val_check_interval is {settings['val_check_interval']}, and an epoch has {count} batches; give at most"
    with pytest.raises(UserError, match=message):
        apply_limits(settings, module(), replicas=1)


@pytest.mark.parametrize(
    ("settings", "data"),
    [
        ({"val_check_interval": 3}, module()),
        ({"val_check_interval": 0.5}, module()),
        ({"val_check_interval": 100, "check_val_every_n_epoch": None}, module()),
        ({"val_check_interval": 100, "fast_dev_run": True}, module()),
        ({"val_check_interval": 100}, module(stream=True)),
        ({"val_check_interval": "00:00:10:00"}, module()),
        ({"val_check_interval": 1.0}, module(stream=True)),
        ({"val_check_interval": 100}, object()),
    ],
)
def test_other_intervals_are_unchanged(settings, data):
    before = dict(settings)
    apply_limits(settings, data, replicas=1)
    assert settings == before


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}])
def test_interval_without_validation_has_no_effect(settings):
    settings = {**settings, "val_check_interval": 100}
    apply_limits(settings, module(validation=None if len(settings) == 1 else 6), replicas=1)
    assert "val_check_interval" not in settings


@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches", "val_check_interval"])
def test_share_of_a_stream_without_length_raises_user_error(option):
    with pytest.raises(UserError, match=rf"{option} 0\.5 is a share, and the stream data\.params\.train has no length"):
        apply_limits({option: 0.5}, module(stream=True), replicas=1)


@pytest.mark.parametrize(
    ("settings", "validation", "expected"),
    [
        ({}, 6, True),
        ({}, None, False),
        ({"limit_val_batches": 0}, 6, False),
        ({"limit_val_batches": 0.0}, 6, False),
        ({"check_val_every_n_epoch": 3, "max_epochs": 2}, 6, False),
        ({"check_val_every_n_epoch": 2, "max_epochs": 2}, 6, True),
        ({"check_val_every_n_epoch": 2, "max_epochs": -1}, 6, True),
        ({"check_val_every_n_epoch": None, "max_epochs": 1}, 6, True),
    ],
)
def test_validates(settings, validation, expected):
    assert validates(settings, module(validation=validation)) is expected
