"""Options of the command and words of the configuration for Lightning. Needs neither torch nor Lightning."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from ldm.config.distribution import install_hint
from ldm.errors import UserError, did_you_mean

# Arguments of the Trainer that are options of the command. Any other argument of the installed Trainer can be given as
# `lightning.trainer.NAME=VALUE`.
VALUE_OPTIONS = frozenset(
    {
        *("accelerator", "strategy", "devices", "num_nodes", "precision", "profiler", "default_root_dir"),
        *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"),
        *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
        *("overfit_batches", "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"),
        *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps"),
        *("reload_dataloaders_every_n_epochs", "model_registry"),
    }
)
# Options that mean true when they are given without a value.
BOOLEAN_OPTIONS = frozenset(
    {
        *("fast_dev_run", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"),
        *("deterministic", "benchmark", "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones"),
        *("sync_batchnorm", "enable_autolog_hparams"),
    }
)
TRAINER_OPTIONS = tuple(sorted(VALUE_OPTIONS | BOOLEAN_OPTIONS))
# Arguments of the Trainer that have their own section in the configuration.
CONFIGURED_ELSEWHERE = ("logger", "callbacks", "plugins")
# Values of `lightning.non_finite`: what follows a loss or gradients that are not finite.
NON_FINITE_POLICIES = ("skip", "stop")
# Loggers that `lightning.logger` and `--logger` name by one word.
LOGGERS = {
    "tensorboard": "pytorch_lightning.loggers.TensorBoardLogger",
    "csv": "ldm.training.loggers.ContinuedCSVLogger",
    "wandb": "pytorch_lightning.loggers.WandbLogger",
}


def check_lightning() -> None:
    """Raise UserError if Lightning is not installed; the check does not import it, which takes seconds."""
    if importlib.util.find_spec("pytorch_lightning") is None:
        raise UserError(f"training needs Lightning; install it with {install_hint()}")


def trainer_arguments(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the Trainer's arguments, for a check of `names`.

    Lightning is imported only if one of `names` is not in the lists of this module.
    """
    listed = (*TRAINER_OPTIONS, *CONFIGURED_ELSEWHERE)
    if set(names) <= set(listed):
        return listed
    import inspect

    from pytorch_lightning import Trainer

    return tuple(inspect.signature(Trainer).parameters)


def logger_words(section: Any) -> list[str]:
    """Return the names of the loggers in `lightning.logger`: "csv", "tensorboard,csv" or a list; none in a mapping.

    Raises:
        UserError: a name is not one of `LOGGERS`.
    """
    if isinstance(section, str):
        section = section.split(",")
    if not isinstance(section, Iterable) or hasattr(section, "keys"):
        return []
    words = [str(word).strip() for word in section]
    for word in words:
        if word not in LOGGERS:
            hint = did_you_mean(word, LOGGERS)
            raise UserError(f'lightning.logger "{word}" is not known{hint}; choose from {", ".join(LOGGERS)}')
    return words
