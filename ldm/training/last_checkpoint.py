"""Callback that saves the checkpoint from which a run resumes."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Save `last.ckpt` after every validation and epoch, at the end, on errors, and on request.

    `ModelCheckpoint` updates its own `last.ckpt` only together with one of the best checkpoints, which loses later
    steps.

    During training, SIGUSR1 requests a checkpoint, Ctrl-C (SIGINT) a checkpoint and the end, and SIGUSR2 the debugger.
    The first two wait for the end of the current batch, because the weights change in between. A second Ctrl-C stops
    immediately.
    """

    def __init__(self, ckptdir: Any) -> None:
        super().__init__()
        self.path = Path(ckptdir) / "last.ckpt"
        self._saved_step: int | None = None
        self._started = False
        self._save_requested = self._stop_requested = False
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first step, and handle Ctrl-C from now on."""
        self._saved_step = trainer.global_step
        self.install_handlers(SIGINT=self._on_interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save on request, and at the last step of a run that ends within an epoch."""
        self._started = True
        is_last_step = 0 <= trainer.max_steps <= trainer.global_step and not trainer.is_last_batch
        if self._save_requested or self._stop_requested or is_last_step:
            self._save_requested = False
            self._save(trainer)
        if self._stop_requested:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop on request, because a validation can take long."""
        if self._stop_requested:
            raise KeyboardInterrupt

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
        can_save = trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt)
        if self._started and can_save and trainer.state.fn == "fit" and self._saved_step != trainer.global_step:
            logger.info('saving "%s" before stopping', self.path)
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run and self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self.restore_handlers()

    def install_handlers(self, **handlers: Any) -> None:
        """Install signal handlers in the main thread, by default those of SIGUSR1 and SIGUSR2."""
        handlers = handlers or {"SIGUSR1": self._on_request, "SIGUSR2": _debug}
        if threading.current_thread() is not threading.main_thread():
            return
        for name, handler in handlers.items():
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                self._previous_handlers.setdefault(number, signal.signal(number, handler))

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        while self._previous_handlers:
            signal.signal(*self._previous_handlers.popitem())

    def _on_request(self, *_: Any) -> None:
        self._save_requested = True

    def _on_interrupt(self, *_: Any) -> None:
        if self._stop_requested:
            raise KeyboardInterrupt
        self._stop_requested = True
        logger.warning("stopping after this batch; press Ctrl-C again to stop immediately")


def _debug(number: int, frame: Any) -> None:
    import pdb

    pdb.Pdb(nosigint=True).set_trace(frame)
