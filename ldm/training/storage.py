"""Read and write Lightning's checkpoints atomically and without running code from them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from ldm.config.targets import shown
from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict
from ldm.io.checkpoint.writing import save_atomically

# Entries besides the weights that a checkpoint needs for resuming a run.
TRAINING_STATE = {"optimizer_states": list, "lr_schedulers": list, "loops": dict, "global_step": int}
# Tables in a state dict that the configuration determines; a checkpoint would replace them without a word.
SCHEDULE_TABLES = ("betas", "posterior_variance")
ALPHA = "model.lora.alpha"


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


def check_resumable(path: Path, model: nn.Module, max_steps: int, max_epochs: int | None = None) -> None:
    """Check that training can resume from `path`.

    Args:
        path: the checkpoint.
        model: the model to train.
        max_steps, max_epochs: limits of the run; a negative number or None is no limit.

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
    _check_model(path, checkpoint, model)
    for entry, kind in TRAINING_STATE.items():
        if not isinstance(checkpoint[entry], kind):
            raise UserError(f'cannot resume from "{path}": its entry "{entry}" is damaged; give another checkpoint')
    _check_unfinished(path, checkpoint, max_steps, max_epochs)


def _check_model(path: Path, checkpoint: dict[str, Any], model: nn.Module) -> None:
    saved, own = read_state_dict(path, as_written=True), model.state_dict()
    for name in (*checkpoint["state_dict"], *own):
        if name not in saved or name not in own or saved[name].shape != own[name].shape:
            raise UserError(
                f'cannot resume from "{path}": the model differs from it in {shown(name)}; '
                "use the configuration of that run"
            )
    if ALPHA in own and float(saved[ALPHA]) != float(own[ALPHA]):
        raise UserError(
            f'cannot resume from "{path}": alpha of the LoRA is {saved[ALPHA]:g}, here {own[ALPHA]:g}; use the '
            "configuration of that run"
        )
    for name in SCHEDULE_TABLES:
        if name in own and not torch.allclose(saved[name].float(), own[name].float(), rtol=1e-4, equal_nan=True):
            raise UserError(
                f'cannot resume from "{path}": the noise schedule differs from it in {name}; '
                "use the configuration of that run"
            )


def _check_unfinished(path: Path, checkpoint: dict[str, Any], max_steps: int, max_epochs: int | None) -> None:
    step, epochs = checkpoint["global_step"], _finished_epochs(checkpoint["loops"])
    if 0 <= max_steps <= step:
        raise UserError(f'"{path}" is already at step {step}; give a larger --max_steps')
    if max_epochs is not None and 0 <= max_epochs <= epochs:
        raise UserError(f'"{path}" is already at epoch {epochs}; give a larger --max_epochs')


def _finished_epochs(loops: dict[str, Any]) -> int:
    """Return the number of finished epochs in the state of Lightning's loops, or -1 if it does not contain it."""
    value: Any = loops
    for key in ("fit_loop", "epoch_progress", "current", "processed"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int) else -1
