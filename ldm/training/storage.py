"""How Lightning's checkpoints reach the disk and come back: whole, and without running code out of them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from ldm.config.targets import shown
from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict
from ldm.io.checkpoint.writing import save_whole

# What a checkpoint holds besides weights when a run can continue from it.
TRAINING_STATE = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "global_step": int}


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads tensors and plain values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, which holds the old file until the new one is complete."""
        save_whole(checkpoint, path)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, safely whatever `weights_only` says."""
        checkpoint = read_checkpoint(path)
        # The file is mapped into memory: states that are kept must not depend on it.
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = copy.deepcopy(checkpoint["optimizer_states"])
        return checkpoint


def check_resumable(path: Path, model: nn.Module, max_steps: int) -> None:
    """Make sure that training can continue from `path`.

    Raises:
        UserError: as `read_state_dict`; or the file holds weights alone, another model, or a run that is over.
    """
    checkpoint = read_checkpoint(path)
    for entry in ("state_dict", *TRAINING_STATE):
        if entry not in checkpoint:
            raise UserError(
                f'cannot continue from "{path}": it holds no {entry}; '
                "start a new run from its weights with model.params.ckpt_path"
            )
    saved, own = read_state_dict(path), model.state_dict()
    for name in (*checkpoint["state_dict"], *own):
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise UserError(f'cannot continue from "{path}": it holds another model, they differ in {shown(name)}')
    for entry, kind in TRAINING_STATE.items():
        if not isinstance(checkpoint[entry], kind):
            raise UserError(f'cannot continue from "{path}": its {entry} cannot be used; give another checkpoint')
    done = checkpoint["global_step"]
    if 0 <= max_steps <= done:
        raise UserError(f'"{path}" has done {done} steps already; give more than that as --max_steps')
