"""Callback that keeps the best checkpoints."""

from __future__ import annotations

import pytorch_lightning.callbacks
import torch
from pytorch_lightning import Trainer
from torch import Tensor

# The class has Lightning's name, because checkpoints store the state of a callback under it.


class ModelCheckpoint(pytorch_lightning.callbacks.ModelCheckpoint):
    """Lightning's callback, except that a checkpoint with a monitored value of NaN or infinity is never a best one."""

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether the monitored value is finite and one of the `save_top_k` best; -1 keeps every checkpoint."""
        if current is not None and self.save_top_k != -1 and not torch.isfinite(current).all():
            return False
        return super().check_monitor_top_k(trainer, current)
