"""Limits of the Trainer, checked against the number of batches before the run starts."""

from __future__ import annotations

import logging
import math
from typing import Any

from pytorch_lightning import Trainer
from torch.utils.data import IterableDataset

from ldm.errors import UserError
from ldm.training.data import PREFIXES, DataModuleFromConfig
from ldm.training.loader import length_of, shared_length

logger = logging.getLogger(__name__)


def apply_limits(settings: dict[str, Any], data: Any, replicas: int) -> None:
    """Check the limits of the Trainer, and round a share of the batches that is less than one up to one batch.

    Args:
        settings: the arguments of the Trainer, which are changed.
        data: the data module; only a `DataModuleFromConfig` is checked.
        replicas: number of processes.

    Raises:
        UserError: validation would come after the end of each epoch, or a share of a stream without a length is given.
    """
    if not isinstance(data, DataModuleFromConfig) or settings.get("fast_dev_run"):
        return
    counts = {name: batch_count(data, name, replicas) for name in data.dataset_configs}
    for name, count in counts.items():
        _apply_limit(settings, f"limit_{PREFIXES[name]}_batches", name, count)
    if settings.get("overfit_batches") and "train" in counts:
        _apply_limit(settings, "overfit_batches", "train", counts["train"])
    if "train" in counts:
        _check_interval(settings, _limited(counts["train"], settings), validates(settings, data))


def batch_count(data: DataModuleFromConfig, name: str, replicas: int) -> int | None:
    """Return the number of batches of the data set `name` for each process, or None for a stream without a length."""
    dataset, size = data.datasets[name], data.batch_size_of(name)
    if isinstance(dataset, IterableDataset):
        shared, length = shared_length(dataset, size, replicas, data.workers_of(name)), length_of(dataset)
        return shared if shared is not None or length is None else math.ceil(length / size)
    return math.ceil(math.ceil(len(dataset) / replicas) / size)


def choose_log_interval(settings: dict[str, Any]) -> None:
    """Log at least ten times in a run of few steps, unless `log_every_n_steps` is set. Lightning's default is 50."""
    steps = settings.get("max_steps")
    if isinstance(steps, int) and 0 < steps < 500 and not settings.get("barebones"):
        settings.setdefault("log_every_n_steps", max(1, steps // 10))


def validates(settings: dict[str, Any], data: Any) -> bool:
    """Return whether a run with these arguments of the Trainer ever reaches a validation with data."""
    if isinstance(data, DataModuleFromConfig) and "validation" not in data.dataset_configs:
        return False
    interval, epochs = settings.get("check_val_every_n_epoch", 1), settings.get("max_epochs")
    too_late = isinstance(interval, int) and isinstance(epochs, int) and 0 <= epochs < interval
    return settings.get("limit_val_batches") != 0 and not too_late


def _apply_limit(settings: dict[str, Any], option: str, name: str, count: int | None) -> None:
    limit = settings.get(option)
    if not isinstance(limit, float) or not 0 < limit < 1:
        return
    if count is None:
        raise UserError(
            f"lightning.trainer.{option} {limit:g} is a share, and the stream data.params.{name} has no length; "
            "give a number of batches"
        )
    if int(count * limit) == 0:
        logger.info("%s: %s %g of %d batches is less than one batch; one is used", name, option, limit, count)
        settings[option] = 1


def _limited(count: int | None, settings: dict[str, Any]) -> int | None:
    """Return the number of training batches in an epoch, or None if it is not known."""
    limit = settings.get("overfit_batches") or settings.get("limit_train_batches")
    if isinstance(limit, int) and not isinstance(limit, bool):
        return limit if count is None else min(limit, count)
    return count if count is None or limit is None else int(count * limit)


def _check_interval(settings: dict[str, Any], count: int | None, has_validation: bool) -> None:
    interval = settings.get("val_check_interval")
    if not isinstance(interval, int | float) or settings.get("check_val_every_n_epoch", 1) is None:
        return
    if not has_validation:
        del settings["val_check_interval"]
    elif isinstance(interval, float) and interval != 1.0 and count is None:
        raise UserError(
            f"lightning.trainer.val_check_interval {interval:g} is a share, and the stream data.params.train has no "
            "length; give a number of batches"
        )
    elif isinstance(interval, int) and count is not None and interval > count:
        raise UserError(
            f"lightning.trainer.val_check_interval is {interval}, and an epoch has {count} batches; give at most "
            f"{count}, or check_val_every_n_epoch=null to count batches across epochs"
        )


def total_steps(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps after which a run ends, or None if neither steps nor epochs limit it."""
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(batches):
        manual = getattr(trainer.lightning_module, "manual", None)  # a first stage accumulates batches itself
        accumulated = getattr(manual, "accumulate_grad_batches", None) or trainer.accumulate_grad_batches
        limits.append(trainer.max_epochs * math.ceil(batches / accumulated))
    return min(limits, default=None)
