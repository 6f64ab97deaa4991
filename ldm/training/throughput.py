"""Images a second of a training run."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.io.batch_items import item_count

IMAGES_PER_SECOND = "train/images_per_second"
# Number of latest batches that count.
WINDOW = 50


class Throughput(Callback):
    """Log `train/images_per_second`: the items of the latest batches in all processes, over the time that they took.

    The time includes loading of the data, previews and checkpoints within an epoch, but no validation. The first batch
    counts until there is a second one, because it takes longer.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._is_first = True
        self._since = time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        # `ddp_spawn` sends callbacks to new processes, whose clocks differ.
        return {**self.__dict__, "_batches": deque(maxlen=WINDOW)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start again."""
        self._batches.clear()
        self._is_first = True
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time between two epochs."""
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time of a validation."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the value that includes this batch."""
        now = time.perf_counter()
        if len(self._batches) == 1 and self._is_first:
            self._batches.clear()
            self._is_first = False
        self._batches.append((now - self._since, item_count(batch) * trainer.world_size))
        self._since = now
        seconds = sum(time for time, _ in self._batches)
        if seconds > 0:
            rate = sum(items for _, items in self._batches) / seconds
            pl_module.log(IMAGES_PER_SECOND, rate, on_step=True, on_epoch=False, batch_size=1)
