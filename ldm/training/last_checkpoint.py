"""The checkpoint that a run continues from."""

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
    """Keeps `last.ckpt` up to date: after every validation and epoch, at the end, on errors, and when asked to.

    `ModelCheckpoint` renews its own only along with one of the best, which would lose what came after.

    While training runs, SIGUSR1 asks for a checkpoint, Ctrl-C (SIGINT) for a checkpoint and the end, and SIGUSR2
    for the debugger. The first two wait for the batch under way: in its midst the weights are in no definite state.
    Ctrl-C once more stops at once.
    """

    def __init__(self, ckptdir: Any) -> None:
        super().__init__()
        self.path = Path(ckptdir) / "last.ckpt"
        self._saved_step: int | None = None
        self._started = False
        self._save_asked = self._stop_asked = False
        self._former_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to save."""
        self._saved_step = trainer.global_step
        self.listen(SIGINT=self._on_interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when asked to, and at the last step of a run that ends within an epoch."""
        self._started = True
        ends_here = 0 <= trainer.max_steps <= trainer.global_step and not trainer.is_last_batch
        if self._save_asked or self._stop_asked or ends_here:
            self._save_asked = False
            self._save(trainer)
        if self._stop_asked:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop when asked to; validations may be long."""
        if self._stop_asked:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save within an epoch; at its end the epoch's own hook follows."""
        if self._started and trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the epoch learnt."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what there is when training is interrupted or fails."""
        # One process alone that fails must not wait for the others to save with it.
        together = trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt)
        if self._started and together and trainer.state.fn == "fit" and self._saved_step != trainer.global_step:
            logger.info('saving "%s" before stopping', self.path)
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run and self._saved_step != trainer.global_step:
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved_step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the signals to whoever had them."""
        self.stop_listening()

    def listen(self, **handlers: Any) -> None:
        """Handle signals, by default those that mean the same before training starts; only in the main thread."""
        handlers = handlers or {"SIGUSR1": self._on_request, "SIGUSR2": _debug}
        if threading.current_thread() is not threading.main_thread():
            return
        for name, handler in handlers.items():
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                self._former_handlers.setdefault(number, signal.signal(number, handler))

    def stop_listening(self) -> None:
        """Put the former signal handlers back."""
        while self._former_handlers:
            signal.signal(*self._former_handlers.popitem())

    def _on_request(self, *_: Any) -> None:
        self._save_asked = True

    def _on_interrupt(self, *_: Any) -> None:
        if self._stop_asked:
            raise KeyboardInterrupt
        self._stop_asked = True
        logger.warning("stopping after this batch; Ctrl-C again stops at once")


def _debug(number: int, frame: Any) -> None:
    import pdb

    pdb.Pdb(nosigint=True).set_trace(frame)
