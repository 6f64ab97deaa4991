"""Data module of configurations."""

import os

import pytest
import torch
from torch.utils.data import IterableDataset

from ldm.config import targets
from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.training.data import DataModuleFromConfig, WrappedDataset


class Numbers:
    """Data set of `size` integers from `first` on."""

    def __init__(self, size=10, first=0):
        self.items = list(range(first, first + size))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(6))


class EmptyStream(Stream):
    def __len__(self):
        return 0


class Endless:
    def __getitem__(self, index):
        return index


@pytest.fixture
def target(monkeypatch):
    """Return `target("Numbers")`, the configuration of a class in this module."""
    import sys

    monkeypatch.setitem(sys.modules, "toy_data", sys.modules[__name__])
    with targets.allowing("toy_data", __name__):
        yield lambda name, **params: {"target": f"toy_data.{name}", "params": params}


def build(**params):
    module = instantiate_from_config({"target": "main.DataModuleFromConfig", "params": {"num_workers": 0, **params}})
    module.prepare_data()
    module.setup()
    return module


def batches(loader):
    return [batch.tolist() for batch in loader]


def test_only_configured_data_sets_have_loaders(target):
    from pytorch_lightning.utilities.model_helpers import is_overridden

    module = build(batch_size=4, train=target("Numbers"), validation=target("Numbers", first=100))
    present = [name for name in ("train", "val", "test", "predict") if is_overridden(f"{name}_dataloader", module)]
    assert present == ["train", "val"]


def test_only_training_is_shuffled_by_default(target):
    sets = {name: target("Numbers") for name in ("train", "validation", "test", "predict")}
    default = build(batch_size=10, **sets)
    in_order = [list(range(10))]
    assert batches(default.train_dataloader()) != in_order
    assert batches(default.val_dataloader()) == batches(default.test_dataloader()) == in_order
    assert batches(default.predict_dataloader()) == in_order
    shuffled = build(batch_size=10, shuffle_test_loader=True, shuffle_val_dataloader=True, **sets)
    assert batches(shuffled.val_dataloader()) != in_order
    assert batches(shuffled.test_dataloader()) != in_order


def test_order_depends_on_the_seed(target, monkeypatch):
    orders = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders.append(batches(build(batch_size=10, train=target("Numbers")).train_dataloader()))
    assert orders[0] == orders[1] != orders[2]


def test_wrap_option(target):
    module = build(batch_size=2, wrap=True, train=target("Numbers"))
    assert isinstance(module.datasets["train"], WrappedDataset)
    assert len(module.datasets["train"]) == 10
    assert module.datasets["train"][3] == 3


@pytest.mark.parametrize(("given", "expected"), [(None, min(4, os.cpu_count())), (0, 0), (3, 3)])
def test_number_of_workers(given, expected):
    assert DataModuleFromConfig(2, num_workers=given).num_workers == expected


def test_stream_keeps_its_order(target):
    module = build(batch_size=3, wrap=True, train=target("Stream"))
    assert batches(module.train_dataloader()) == [[0, 1, 2], [3, 4, 5]]


def test_data_sets_are_built_once(target):
    module = build(batch_size=1, train=target("Numbers"))
    dataset = module.datasets["train"]
    module.setup("fit")
    assert module.datasets["train"] is dataset


def test_invalid_parameters_raise_user_error(target):
    with pytest.raises(UserError, match="train is empty"):
        build(batch_size=1, train=target("Numbers", size=0))
    with pytest.raises(UserError, match=r"the data set data\.params\.train is empty; set its number of records"):
        build(batch_size=1, train=target("EmptyStream"))
    with pytest.raises(UserError, match=r"data\.params\.train: Endless has no length; define __len__"):
        build(batch_size=1, train=target("Endless"))
    with pytest.raises(UserError, match="must be an integer of at least 1, not 0"):
        build(batch_size=0)
    with pytest.raises(UserError, match='did you mean "variants"'):
        build(batch_size=1, latent_cache={"variant": 1})


def test_latent_cache_settings_are_stored():
    assert DataModuleFromConfig(1).latent_cache is None
    assert DataModuleFromConfig(1, latent_cache={"variants": 2}).latent_cache == {"variants": 2}


def test_batches_are_tensors(target):
    module = build(batch_size=4, train=target("Numbers"))
    assert all(isinstance(batch, torch.Tensor) for batch in module.train_dataloader())


def test_errors_of_loaders_name_the_data_set(target):
    module = build(batch_size=2, train=target("Numbers"), validation=target("Numbers"))
    assert module.train_dataloader().name == "data.params.train"
    assert module.val_dataloader().name == module.val_dataloader().collate_fn.name == "data.params.validation"
