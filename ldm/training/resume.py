"""Resumed runs: settings of the configuration replace those of the checkpoint, and the time limit counts again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_checkpoint
from ldm.training.modules import ModelTraining

logger = logging.getLogger(__name__)

# Settings of a parameter group that the configuration determines. The rest of an optimizer is its state.
SETTINGS = ("lr", "initial_lr", "weight_decay", "betas", "eps")


class ConfiguredSettings(Callback):
    """Restore the settings of the configuration after the state of a checkpoint has been loaded.

    A loaded optimizer has the learning rate of the checkpoint. With this callback, a resumed run trains with the one of
    its configuration, at the position in the schedule that the checkpoint contains. The same holds for the patience of
    `EarlyStopping`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settings: list[list[dict[str, Any]]] = []
        self._patience: dict[EarlyStopping, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the settings of the callbacks before their states are loaded."""
        self._patience = {callback: callback.patience for callback in trainer.early_stopping_callbacks}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the settings of the optimizers before their states are loaded."""
        self._settings = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the settings, and compute the learning rates of the current position."""
        for callback, patience in self._patience.items():
            callback.patience = patience
        for optimizer, settings in zip(trainer.optimizers, self._settings, strict=True):
            for group, own in zip(optimizer.param_groups, settings, strict=True):
                group.pop("initial_lr", None)  # a checkpoint of a run with a schedule has it
                group.update(own)
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                _compute_rates(config.scheduler)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in SETTINGS if name in group}


def _compute_rates(scheduler: LambdaLR) -> None:
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def check_optimizers(path: Path, module: LightningModule) -> None:
    """Check that the optimizers of `module` can load their states from a checkpoint, and log settings that change.

    A LightningModule of the user's own is not checked; its optimizers load everything from the checkpoint. Neither are
    the optimizers of a model that configures them itself.

    Args:
        path: a checkpoint that `check_resumable` accepts.
        module: the adapter of the model.

    Raises:
        UserError: the checkpoint is that of a run which trained other parameters, or it is damaged.
    """
    if not isinstance(module, ModelTraining):
        logger.info("the optimizers of %s continue with the settings of the checkpoint", type(module).__name__)
        return
    if "configure_optimizers" in module.hooks:
        return
    optimizers, _ = cast(tuple[list[Optimizer], Any], module.configure_optimizers())
    states = read_checkpoint(path)["optimizer_states"]
    try:
        same = len(states) == len(optimizers) and all(map(_matches, optimizers, states))
        changes = [line for pair in zip(optimizers, states, strict=False) for line in _changes(*pair)]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'cannot resume from "{path}": its optimizers are damaged; give another checkpoint') from None
    if not same:
        raise UserError(
            f'cannot resume from "{path}": this configuration trains other parameters than that run; use the '
            "configuration of that run, or start a new run from its weights with model.params.ckpt_path=PATH"
        )
    for line in dict.fromkeys(changes):
        logger.info("resuming with %s", line)


def _matches(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Return whether a saved state has the groups of an optimizer, and tensors of the shapes of its parameters."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in state["param_groups"]]:
        return False
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    averages = [state["state"].get(index, {}).get("exp_avg") for index in range(sum(sizes))]
    return all(a is None or a.shape == p.shape for a, p in zip(averages, parameters, strict=True))


def _changes(optimizer: Optimizer, state: dict[str, Any]) -> list[str]:
    """Return lines about the settings of an optimizer that differ from those of its saved state."""
    lines = []
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=False):
        own, before = ({**_settings(values), "lr": values.get("initial_lr", values["lr"])} for values in (group, saved))
        names = {"lr": "learning rate", "weight_decay": "weight decay", "betas": "betas", "eps": "eps"}
        lines += [
            f"{label} {own[name]}; the checkpoint has {before[name]}"
            for name, label in names.items()
            if name in own and name in before and own[name] != before[name]
        ]
    return lines


class TimeLimit(Timer):
    """Timer of the Trainer's `max_time`, which counts the time since the run was started or resumed."""

    @property
    def state_key(self) -> str:
        """Key of the timer in a checkpoint: that of Lightning's timer, whose state is ignored."""
        return "Timer"

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, because the next slice of the run has the whole time."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the time of earlier slices."""
