"""Callback that saves the checkpoint from which a run resumes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from ldm.training.finite_steps import DamagedBatchError, DivergenceError
from ldm.training.signals import SignalRequests

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Save `last.ckpt` after every validation and epoch, at the end, on errors, and on request.

    `ModelCheckpoint` updates its own `last.ckpt` only together with one of the best checkpoints, which loses later
    steps.

    Signals request checkpoints and the end of the run, see `SignalRequests`.
    """

    def __init__(self, ckptdir: Any) -> None:
        super().__init__()
        self.path = Path(ckptdir) / "last.ckpt"
        self._saved_step: int | None = None
        self._started = False
        self.requests = SignalRequests()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the requests of signals from now on."""
        self.requests.begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first step, and collect the requests of signals from now on."""
        self._saved_step = trainer.global_step
        self.requests.begin(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on request, and at the last step of a run that ends within an epoch."""
        self._started = True
        is_last_step = 0 <= trainer.max_steps <= trainer.global_step and not trainer.is_last_batch
        save_requested, stop_requested = self.requests.take()
        if save_requested or stop_requested or is_last_step:
            self._save(trainer)
        if stop_requested:
            raise self.requests.interruption()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop on request, because a validation can take long."""
        if self.requests.take_stop():
            if self._started and trainer.state.fn == "fit":
                self._save(trainer)
            raise self.requests.interruption()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation within an epoch; `on_train_epoch_end` saves at the end of the epoch."""
        if self._started and trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when training fails or is interrupted."""
        # Saving involves all processes: one that fails alone must not wait for the others.
        can_save = trainer.world_size == 1 or self.requests.stop_agreed or isinstance(exception, DamagedBatchError)
        can_save = can_save and not isinstance(exception, DivergenceError)
        if can_save:
            self.requests.allow_time()
        if self._started and can_save and trainer.state.fn == "fit" and self._saved_step != trainer.global_step:
            logger.info('saving "%s" before stopping', self.path)
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined] # Lightning sets it without a declaration
        if not is_trial and self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self.requests.restore()

    def install_handlers(self, trainer: Trainer) -> None:
        """Install the signal handlers."""
        self.requests.install(trainer)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        self.requests.restore()
