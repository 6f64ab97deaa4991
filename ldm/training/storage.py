"""Read and write Lightning's checkpoints atomically and without running code from them."""

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
from ldm.io.checkpoint.writing import save_atomically

# Entries besides the weights that a checkpoint needs for resuming a run.
TRAINING_STATE = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "global_step": int}


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes atomically, and reads only tensors and plain values."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, which keeps the old file until the new one is complete."""
        save_atomically(checkpoint, path)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint safely, regardless of `weights_only`."""
        checkpoint = read_checkpoint(path)
        # The file is mapped into memory, and the optimizers must not depend on it.
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = copy.deepcopy(checkpoint["optimizer_states"])
        return checkpoint


def check_resumable(path: Path, model: nn.Module, max_steps: int) -> None:
    """Check that training can resume from `path`.

    Raises:
        UserError: as `read_state_dict`; or the file contains only weights, another model, or a finished run.
    """
    checkpoint = read_checkpoint(path)
    for entry in ("state_dict", *TRAINING_STATE):
        if entry not in checkpoint:
            raise UserError(
                f'cannot resume from "{path}": it contains no {entry}; '
                "to start a new run from its weights, give model.params.ckpt_path=PATH"
            )
    saved, own = read_state_dict(path), model.state_dict()
    for name in (*checkpoint["state_dict"], *own):
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise UserError(
                f'cannot resume from "{path}": the model differs from it in {shown(name)}; '
                "use the configuration of that run"
            )
    for entry, kind in TRAINING_STATE.items():
        if not isinstance(checkpoint[entry], kind):
            raise UserError(f'cannot resume from "{path}": its entry "{entry}" is damaged; give another checkpoint')
    step = checkpoint["global_step"]
    if 0 <= max_steps <= step:
        raise UserError(f'"{path}" is already at step {step}; give a larger --max_steps')
