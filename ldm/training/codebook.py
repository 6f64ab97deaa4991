"""Use of the codebook of a first stage during training."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Vectors for each entry of the codebook in a window. With uniform use, a window misses 1 entry in 20,000.
VECTORS_PER_ENTRY = 10
# A window with a smaller share of used entries, or with a single one, counts as collapsed.
COLLAPSED_SHARE = 0.02
# Number of collapsed windows in a row after which a warning is logged.
COLLAPSED_WINDOWS = 3


def codebook_size(model: nn.Module) -> int | None:
    """Return the number of entries that a quantizer can choose, or None for a model without a codebook."""
    size = getattr(getattr(model, "quantize", None), "re_embed", None)
    return size if isinstance(size, int) else None


class CodebookUse(Callback):
    """Log the use and the perplexity of the codebook, and warn if it has collapsed.

    `train/codebook_use` is the share of the entries that a window of training used. `train/codebook_perplexity` is the
    perplexity of their frequencies: 1 for a single entry, the size of the codebook for uniform use. A window holds
    about ten vectors for each entry, from all processes. `val/codebook_use` and `val/codebook_perplexity` are those of
    a whole validation.

    Args:
        size: number of entries of the codebook.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._counts: dict[str, Tensor] = {}
        self._batches = 0
        self._window: int | None = None
        self._collapsed = 0
        self._has_warned = False

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the current window."""
        counts = self._counts.get("train")
        return {
            "counts": None if counts is None else counts.cpu(),
            "batches": self._batches,
            "window": self._window,
            "collapsed": self._collapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the window of a checkpoint, if it has the same codebook."""
        counts = state_dict["counts"]
        if counts is None or len(counts) == self.size:
            self._counts = {} if counts is None else {"train": counts}
            self._batches, self._window = state_dict["batches"], state_dict["window"]
            self._collapsed = state_dict["collapsed"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the entries of a batch, and log the values at the end of a window."""
        codes = pl_module.codes.get("train")
        if codes is None:
            return
        if self._window is None:
            self._window = self._window_length(trainer, codes)
        self._count("train", codes)
        self._batches += 1
        if self._batches < self._window:
            return
        use, perplexity = self._take(trainer, "train")
        for name, value in (("use", use), ("perplexity", perplexity)):
            pl_module.log(f"train/codebook_{name}", value, on_step=True, on_epoch=False, batch_size=1)
        self._check(trainer, use)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count for a validation."""
        self._counts.pop("val", None)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Count the entries of a validation batch."""
        codes = pl_module.codes.get("val")
        if codes is not None:
            self._count("val", codes)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values of a validation."""
        if "val" in self._counts:
            use, perplexity = self._take(trainer, "val")
            for name, value in (("use", use), ("perplexity", perplexity)):
                pl_module.log(f"val/codebook_{name}", value, batch_size=1)

    def _window_length(self, trainer: Trainer, codes: Tensor) -> int:
        """Return the number of batches in a window, the same in all processes."""
        batches = math.ceil(VECTORS_PER_ENTRY * self.size / (codes.numel() * trainer.world_size))
        length = torch.tensor(float(batches), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(length, reduce_op="max"))

    def _count(self, split: str, codes: Tensor) -> None:
        counts = torch.bincount(codes.flatten(), minlength=self.size)
        before = self._counts.get(split)
        self._counts[split] = counts if before is None else before.to(counts.device) + counts

    def _take(self, trainer: Trainer, split: str) -> tuple[float, float]:
        """Return the use and the perplexity of all processes, and start to count again."""
        counts = trainer.strategy.reduce(self._counts.pop(split).double(), reduce_op="sum")
        if split == "train":
            self._batches = 0
        frequencies = counts[counts > 0] / counts.sum()
        use = len(frequencies) / self.size
        return use, math.exp(float(-(frequencies * frequencies.log()).sum()))

    def _check(self, trainer: Trainer, use: float) -> None:
        used = round(use * self.size)
        is_collapsed = use < COLLAPSED_SHARE or used == 1 < self.size
        self._collapsed = self._collapsed + 1 if is_collapsed else 0
        if self._collapsed >= COLLAPSED_WINDOWS and not self._has_warned and trainer.is_global_zero:
            self._has_warned = True
            logger.warning(
                "the codebook has collapsed: %d of its %d entries are used at step %d, after %d windows in a row below "
                "%g %%; lower base_learning_rate or codebook_weight, or give another --seed",
                *(used, self.size, trainer.global_step, self._collapsed, 100 * COLLAPSED_SHARE),
            )
