"""Models that are also LightningModules, in programs that have imported Lightning.

A model is a plain module, because Lightning takes as long to import as torch, and sampling does not need it. A program
that trains has imported Lightning before it builds a model. There, a `Trainable` model is built as an instance of a
class that derives from its own class and from LightningModule, and `Trainer.fit(model, data)` accepts it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import getattr_static
from typing import Any

from torch import nn

PACKAGES = ("pytorch_lightning", "lightning.pytorch")  # two names of Lightning, with different classes
# The methods that Lightning calls, besides those whose names begin with "on_".
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_OPTIMIZATION = (
    "configure_optimizers",
    "configure_gradient_clipping",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
)
_DATA = (
    "prepare_data",
    "setup",
    "teardown",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "transfer_batch_to_device",
)
# Hooks of Lightning 1, each with the hook of Lightning 2 that replaces it.
REMOVED = {
    "training_epoch_end": "on_train_epoch_end",
    "validation_epoch_end": "on_validation_epoch_end",
    "test_epoch_end": "on_test_epoch_end",
    "training_step_end": "training_step",
    "validation_step_end": "validation_step",
    "test_step_end": "test_step",
    "tbptt_split_batch": "training_step",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
}
HOOKS = frozenset({*_STEPS, *_OPTIMIZATION, *_DATA, "configure_callbacks", "configure_model", *REMOVED})
# Hooks whose result replaces that of an adapter. The others are called after those of the adapter.
REPLACING = frozenset({*_STEPS, *_OPTIMIZATION, *_DATA, "configure_callbacks", "on_after_batch_transfer"}) - {
    "prepare_data",
    "setup",
    "teardown",
}
OWN_MODULES = frozenset({"ldm.models.diffusion.training_hooks"})

_plain = False


class Trainable(nn.Module):
    """Base class of models that are built as LightningModules in a program that has imported Lightning."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        plain = _plain and not overridden_hooks(cls)
        return super().__new__(cls if plain else with_lightning(cls))


@contextmanager
def plain_models() -> Iterator[None]:
    """Build plain models while the context manager is active, except those whose class has hooks of its own."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def lightning_class() -> type[Any] | None:
    """Return the class LightningModule of the package that the program has imported, or None."""
    for package in PACKAGES:
        found = getattr(sys.modules.get(package), "LightningModule", None)
        if isinstance(found, type):
            return found
    return None


def with_lightning(cls: type[Any]) -> type[Any]:
    """Return the class that derives from `cls` and from LightningModule; `cls` itself if there is no need."""
    base = lightning_class()
    if base is None or issubclass(cls, base):
        return cls
    return _derived(cls, base)  # type: ignore[arg-type] # mypy takes classes for unhashable


def attach_lightning(model: Any) -> None:
    """Make a model that was built before Lightning was imported a LightningModule; its contents stay the same."""
    base = lightning_class()
    if base is None or isinstance(model, base):
        return
    contents = dict(model.__dict__)
    model.__class__ = with_lightning(type(model))
    base.__init__(model)  # empties the module
    model.__dict__.update(contents)


@cache
def _derived(cls: type[Any], base: type[Any]) -> type[Any]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, base), {**names, "__reduce_ex__": _reduce, "plain_class": cls})


def _reduce(model: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle a model by its plain class, which its module defines."""
    return _restore, (model.plain_class,), dict(model.__dict__)


def _restore(cls: type) -> Any:
    return object.__new__(with_lightning(cls))


def overridden_hooks(cls: type) -> list[str]:
    """Return the names of the hooks that a class outside this package and Lightning defines, sorted."""
    packages = ("lightning", "pytorch_lightning", "lightning_fabric", "torch")
    found = []
    for name in dir(cls):
        if name in HOOKS or name.startswith("on_"):
            home = next(base for base in cls.__mro__ if name in vars(base)).__module__
            is_method = callable(getattr_static(cls, name)) or isinstance(getattr_static(cls, name), staticmethod)
            if is_method and home not in OWN_MODULES and home.partition(".")[0] not in packages:
                found.append(name)
    return found
