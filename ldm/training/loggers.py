"""Loggers of a run: TensorBoard, CSV and Weights & Biases by one word, and the configuration as hyperparameters."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from ldm.config.distribution import install_hint
from ldm.config.instantiate import get_obj_from_str
from ldm.errors import UserError
from ldm.training.options import LOGGERS, logger_words

TENSORBOARD = LOGGERS["tensorboard"]


def build_loggers(section: Any, folder: Path) -> Any:
    """Build the loggers that `lightning.logger` names; without it TensorBoard, which logs in the folder of the run.

    Args:
        section: a word such as "csv", several words, or a mapping with `target` and `params`.
        folder: the folder of the run.

    Returns:
        A logger, or a list of several.

    Raises:
        UserError: a logger is unknown, its package is not installed, or a parameter is invalid.
    """
    words = logger_words(section)
    if words:
        built = [_build(LOGGERS[word], _default_params(LOGGERS[word], folder)) for word in words]
        return built[0] if len(built) == 1 else built
    section = section or {}
    target = section.get("target", TENSORBOARD)
    target = LOGGERS.get(target, target)
    defaults = _default_params(target, folder)
    return _build(target, {**defaults, **(section.get("params") or {})})


def _default_params(target: str, folder: Path) -> dict[str, Any]:
    """Return the parameters of a logger that logs in the folder of a run, and continues the logs of a resumed one."""
    if target == LOGGERS["wandb"]:
        own_id = re.sub(r"[^\w-]", "-", folder.name)
        return {"project": "ldm", "name": folder.name, "id": own_id, "save_dir": str(folder)}
    if target == LOGGERS["csv"]:
        return {"name": "csv", "version": "", "save_dir": str(folder)}
    params = {"name": "tensorboard", "save_dir": str(folder)}
    return {**params, "version": ""} if target == TENSORBOARD else params


def _build(target: str, params: Mapping[str, Any]) -> Any:
    try:
        return get_obj_from_str(target)(**params)
    except ModuleNotFoundError as error:
        if target == LOGGERS["wandb"]:
            hint = install_hint("wandb")
            raise UserError(f"lightning.logger wandb needs a package that is not installed; run {hint}") from error
        raise UserError(f"lightning.logger cannot be built: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"lightning.logger cannot be built: {error}") from error


class Hyperparameters(Callback):
    """Log the configuration of a run as its hyperparameters.

    A LightningModule of the user's own that saves hyperparameters keeps these.

    Args:
        values: the configuration, and the values that the run has derived from it.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values instead of the empty hyperparameters of the adapter."""
        if pl_module.hparams:
            return
        pl_module._log_hyperparams = False
        for run_logger in trainer.loggers:
            run_logger.log_hyperparams(self.values)


class ContinuedWriter(ExperimentWriter):
    """Writer of `metrics.csv` that continues the file of an earlier slice of the run.

    The rows from the first new step on are replaced: a run that was killed had written them after its checkpoint.
    """

    def __init__(self, log_dir: str, first_step: int | None = None) -> None:
        self._continues, self._first_step = False, first_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Read the columns of an existing file, which Lightning's writer would delete."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])
            self._continues = bool(self.metrics_keys)
            if not self._continues:
                path.unlink()

    def save(self) -> None:
        """Append the recorded rows to the file."""
        if self._continues and self.metrics:
            first_logged = min(row["step"] for row in self.metrics)
            self._remove_rows(first_logged if self._first_step is None else self._first_step)
            self._continues = False
        super().save()

    def _remove_rows(self, first_step: float) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if _step(row) < first_step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def _step(row: Mapping[str, Any]) -> float:
    """Return the step of a row, or infinity for a row that was not written completely."""
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


class ContinuedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which continues `metrics.csv` in a resumed run.

    Attributes:
        first_step: step from which on existing rows are replaced; None is that of the first new row.
    """

    first_step: int | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Writer of the file."""
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = ContinuedWriter(self.log_dir, self.first_step)
        return self._experiment
