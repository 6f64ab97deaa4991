"""Memory and processors of this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GIGABYTE = 1 << 30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
UNKNOWN_MEMORY = 8 * GIGABYTE


@dataclass(frozen=True)
class Machine:
    """Machine that trains.

    Attributes:
        memory: main memory in bytes.
        cores: number of processor cores.
        gpu_memory: memory of the first GPU in bytes; 0 without a GPU.
    """

    memory: int
    cores: int
    gpu_memory: int = 0

    @classmethod
    def this(cls) -> Machine:
        """Return the machine that runs this program."""
        return cls(_memory(), os.cpu_count() or 1, _gpu_memory())

    @property
    def has_gpu(self) -> bool:
        """True if it has a GPU."""
        return self.gpu_memory > 0

    @property
    def training_memory(self) -> int:
        """Memory that a training run may use, in bytes."""
        return int(0.75 * self.gpu_memory) if self.has_gpu else int(0.4 * self.memory)

    def __str__(self) -> str:
        device = f"a GPU with {self.gpu_memory / GIGABYTE:.0f} GB" if self.has_gpu else "no GPU"
        return f"{self.cores} cores, {self.memory / GIGABYTE:.0f} GB of memory, {device}"


def _memory() -> int:
    """Return the main memory that the process may use, in bytes."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        total = UNKNOWN_MEMORY
    for file in CGROUP_LIMITS:  # of a container
        try:
            total = min(total, int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return total


def _gpu_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
