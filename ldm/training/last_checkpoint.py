"""Callback that saves the checkpoint from which a run resumes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from ldm.training.finite_steps import DamagedBatchError, DivergenceError
from ldm.training.loops import EpochLoop, Point, install_loops
from ldm.training.modules import ModelTraining
from ldm.training.signals import SignalRequests

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Save `last.ckpt` after every validation and epoch, at the end, on errors, and on request.

    `ModelCheckpoint` updates its own `last.ckpt` only together with one of the best checkpoints, which loses later
    steps. It also saves within a batch, which leaves out the rest of it; see `EpochLoop`.

    Signals request checkpoints and the end of the run, see `SignalRequests`.
    """

    def __init__(self, ckptdir: Any) -> None:
        super().__init__()
        self.path = Path(ckptdir) / "last.ckpt"
        self._saved: tuple[int, Point | None] | None = None
        self._started = self._has_validated = self._has_new_gradients = False
        self.requests = SignalRequests()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the loops of the trainer by resumable ones."""
        if stage == "fit":
            install_loops(trainer, self)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the requests of signals from now on."""
        self.requests.begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the requests of signals from now on."""
        self.requests.begin(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember that the gradients contain those of an incomplete batch."""
        self._has_new_gradients = True

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Remember that there is something to save."""
        self._started = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that a checkpoint is due, once the results have been logged."""
        self._has_validated = not trainer.sanity_checking

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop on request, because a validation can take long; a resumed run repeats it."""
        is_training = self._started and trainer.state.fn == "fit"
        if (is_training and _loses_gradients(trainer)) or not self.requests.take_stop():
            return
        if is_training:
            with _loop(trainer).at("batch"):
                self._save(trainer)
        self._stop(trainer)

    def on_point(self, trainer: Trainer, point: Point) -> None:
        """Save if it is due at this point, and stop on request."""
        is_end_of_epoch = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if point == "batch":
            self._has_new_gradients = False
            save_requested, stop_requested = (False, False) if _loses_gradients(trainer) else self.requests.take()
            if save_requested or stop_requested:
                self._save(trainer)
            if stop_requested:
                self._stop(trainer)
        elif point == "epoch" or (not is_end_of_epoch and (self._has_validated or _is_last(trainer))):
            self._save(trainer)
            self._has_validated = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when training fails or is interrupted, without a batch that has not taken its step."""
        # Saving involves all processes: one that fails alone must not wait for the others.
        can_save = trainer.world_size == 1 or self.requests.stop_agreed or isinstance(exception, DamagedBatchError)
        can_save = can_save and not isinstance(exception, DivergenceError)
        if can_save:
            self.requests.allow_time()
        if not (self._started and can_save and trainer.state.fn == "fit"):
            return
        loop = _loop(trainer)
        point = loop.discard_batch()
        if point == "validation" and self._has_new_gradients:
            pl_module.zero_grad()
        elif point is None and trainer.validating:
            point = "batch"
        if self._saved is None or self._saved[0] != loop.batch_progress.total.completed:
            logger.info('saving "%s" before stopping', self.path)
            with loop.at(point):
                self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined] # Lightning sets it without a declaration
        loop = _loop(trainer)
        state = (loop.batch_progress.total.completed, loop.point)
        if not is_trial and self._saved != state:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved = state

    def _stop(self, trainer: Trainer) -> None:
        """End the run on request."""
        if self._saved is not None and trainer.is_global_zero:
            folder = self.path.parent.parent
            logger.info('saved "%s" at step %d; continue with -r "%s"', self.path, trainer.global_step, folder)
        raise self.requests.interruption()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self.requests.restore()

    def install_handlers(self, trainer: Trainer) -> None:
        """Install the signal handlers."""
        self.requests.install(trainer)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        self.requests.restore()


def _loop(trainer: Trainer) -> EpochLoop:
    return cast(EpochLoop, trainer.fit_loop.epoch_loop)


def _loses_gradients(trainer: Trainer) -> bool:
    """Return whether a checkpoint would lose gradients of accumulated batches, which differ in several processes."""
    module = trainer.lightning_module
    if trainer.world_size == 1:
        return False
    return module.is_accumulating() if isinstance(module, ModelTraining) else trainer.fit_loop._should_accumulate()


def _is_last(trainer: Trainer) -> bool:
    """Return whether the run ends after this batch."""
    is_last_step = 0 <= trainer.max_steps <= trainer.global_step
    return is_last_step or (trainer.should_stop and trainer.fit_loop._can_stop_early)
