"""Files of the parts that a run trains beside a frozen model, in the folder of the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from ldm.models.diffusion.adaptation import Adaptation
from ldm.pipelines.trained_parts import trained_parts

logger = logging.getLogger(__name__)


class TrainedParts(Callback):
    """Write a LoRA, and the embeddings of new words, to the folder of the run with every checkpoint.

    Args:
        folder: the folder.
        config: target and parameters of the model.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__()
        self.folder, self.config = folder, config
        self._announced = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the files of the state that is saved, in the first process only."""
        if not trainer.is_global_zero:
            return
        for part in trained_parts(checkpoint["state_dict"], self.config):
            path = part.save(self.folder, {"step": checkpoint["global_step"]})
            if not self._announced:
                logger.info('writing "%s" with every checkpoint: %s', path, part.what)
        self._announced = True


def is_adapted(model: Any) -> bool:
    """Return whether a run trains parts beside a frozen model."""
    return isinstance(model, Adaptation) and model.adapted
