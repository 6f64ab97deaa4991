"""Several processes of one run: decisions that they take together, and their end."""

from __future__ import annotations

import signal
import time
from subprocess import Popen
from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.multiprocessing import ProcessRaisedException

from ldm.errors import UserError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

USER_ERROR_STATUS = 2  # of every command, see `ldm.cli.command`


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether at least one process set it. Every process must call this at the same point."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return flags
    # NCCL sends tensors of GPUs only.
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    united = torch.tensor(flags, dtype=torch.int64, device=device)
    distributed.all_reduce(united, distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in united.tolist())


def end_launched(trainer: Trainer) -> None:
    """End the processes that this one has launched, because they would wait for this one after its failure."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has no SIGKILL


def spawns(trainer: Trainer) -> bool:
    """Return whether training runs in new processes only, as with `ddp_spawn`, and not in this one."""
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def failed_process(trainer: Trainer, seconds: float = 3.0) -> int | None:
    """Return the number of a launched process that has printed an error of the user and ended, or None.

    Args:
        trainer: the trainer, which has lost the connection to another process.
        seconds: time to wait for the end of such a process.
    """
    processes = [process for process in getattr(trainer.strategy.launcher, "procs", []) if isinstance(process, Popen)]
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.poll() == USER_ERROR_STATUS for process in processes):
            break
        time.sleep(0.05)
    return next((i for i, process in enumerate(processes, 1) if process.poll() == USER_ERROR_STATUS), None)


def user_error_of(error: Exception) -> UserError | None:
    """Return the UserError behind an error of a run, or None.

    Lightning reports a configuration that it rejects with an exception of its own, and errors of new processes as text.
    """
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException):
        return UserError(f"Lightning rejects the configuration: {' '.join(str(error).split())}")
    last_line = str(error).rstrip().rpartition("\n")[2]
    name, _, message = last_line.partition(": ")
    is_text = isinstance(error, ProcessRaisedException) and name.endswith("Error") and name.startswith("ldm.")
    return UserError(message) if is_text else None
