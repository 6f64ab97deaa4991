"""Logs of a resumed run: they continue at its checkpoint, without values that a killed run has logged after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger

from ldm.io.checkpoint.reading import read_checkpoint
from ldm.training.loggers import ContinuedCSVLogger

LOGGED_KEY = "logged_bytes"


class LogPosition(Callback):
    """Save in each checkpoint how much the run has logged, so that a resumed run finds values that follow it."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the size of the event files; none if they contain values of a batch that the checkpoint leaves out."""
        if trainer.is_global_zero and not getattr(trainer.fit_loop.epoch_loop, "has_discarded", False):
            checkpoint[LOGGED_KEY] = sum(_logged_bytes(run_logger, flush=True) for run_logger in trainer.loggers)


def continue_logs(loggers: Any, path: Path) -> None:
    """Let loggers continue at a checkpoint: values from its step on are replaced.

    TensorBoard hides them, because its files only grow. The CSV file loses these rows.

    Args:
        loggers: a logger, or several, that have not logged yet.
        path: a checkpoint that `check_resumable` accepts.
    """
    checkpoint = read_checkpoint(path)
    loops = checkpoint["loops"].get("fit_loop", {})
    if "_batches_that_stepped" not in loops.get("epoch_loop.state_dict", {}):
        return
    first_step = _first_step(loops)
    all_loggers = list(loggers) if isinstance(loggers, Iterable) else [loggers]
    has_later_values = checkpoint.get(LOGGED_KEY) != sum(map(_logged_bytes, all_loggers))
    for run_logger in all_loggers:
        if isinstance(run_logger, TensorBoardLogger):
            run_logger._default_hp_metric = False  # logged again, it would have two points
        if isinstance(run_logger, TensorBoardLogger) and has_later_values:
            run_logger._kwargs.setdefault("purge_step", first_step)
        elif isinstance(run_logger, ContinuedCSVLogger):
            run_logger.first_step = first_step


def _first_step(loops: dict[str, Any]) -> int:
    """Return the number of the first step that a run logs after a checkpoint."""
    state, epochs = loops["epoch_loop.state_dict"], loops["epoch_progress"]["current"]
    point, is_within_epoch = state.get("point"), epochs["processed"] < epochs["started"]
    # `ModelCheckpoint` saves within a batch. Until its end, the number of its step is not counted.
    is_within_batch = point == "batch" or (point is None and is_within_epoch)
    return int(state["_batches_that_stepped"]) + is_within_batch


def _logged_bytes(run_logger: Any, flush: bool = False) -> int:
    """Return the size of the event files of a TensorBoard logger; 0 for other loggers."""
    if not isinstance(run_logger, TensorBoardLogger):
        return 0
    if flush:
        run_logger.save()
    return sum(path.stat().st_size for path in Path(run_logger.log_dir).glob("*tfevents*"))
