"""Data loader whose order depends on the seed alone and which resumes in the middle of an epoch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info


class EpochBatches(Sampler[list[int]]):
    """Sampler of batches of indices; seed and epoch determine the order of each epoch.

    Args:
        size: number of items in the data set.
        batch_size: number of indices in a batch; the last batch may be smaller.
        shuffle: shuffle the indices in each epoch.
        seed: seed of the orders.
        rank, replicas: this process uses every `replicas`-th index from `rank` on, padded to equal counts.
    """

    def __init__(self, size: int, batch_size: int, shuffle: bool, seed: int, rank: int = 0, replicas: int = 1) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.rank, self.replicas = rank, replicas
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist() if self.shuffle else list(range(self.size))
        order += order[: -len(order) % self.replicas]
        indices = order[self.rank :: self.replicas]
        for first in range(self.start * self.batch_size, len(indices), self.batch_size):
            yield indices[first : first + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.size / self.replicas) / self.batch_size)


class ResumableLoader(DataLoader):
    """Data loader that tracks its epoch and position, which Lightning saves in checkpoints.

    Args:
        dataset: the data set; an iterable one keeps its own order and restarts from its beginning.
        batch_size: number of items in a batch.
        limit: number of batches that the trainer uses of an epoch, if it does not use all.
        shuffle, seed, rank, replicas: see `EpochBatches`.
        options: further arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        replicas: int = 1,
        limit: int | None = None,
        **options: Any,
    ) -> None:
        # With its own generator, the start of an epoch leaves PyTorch's global generator unchanged.
        options["generator"] = torch.Generator()
        if isinstance(dataset, IterableDataset):
            super().__init__(dataset, batch_size=batch_size, **options)
            self.batches = None
        else:
            self.batches = EpochBatches(len(dataset), batch_size, shuffle, seed, rank, replicas)
            super().__init__(dataset, batch_sampler=self.batches, **options)
        self.seed, self.limit = seed, limit
        self.epoch, self.position, self._used = 0, 0, False

    def __iter__(self) -> Iterator[Any]:
        # Lightning may start an epoch twice; the epoch is over only if it returned a batch.
        if self._used:
            self.epoch, self.position, self._used = self.epoch + 1, 0, False
        if self.batches is not None:
            self.batches.epoch, self.batches.start, self.batches.seed = self.epoch, self.position, self.seed
        self.generator.manual_seed(self.seed + self.epoch)
        return self._counted(super().__iter__())

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.position, self._used = self.position + 1, True
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches returned in it, and the seed."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore epoch, position and seed; the next iteration resumes the epoch or starts the next one."""
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]
        if self.batches is None:
            self.position = 0
        elif self.position >= (len(self) if self.limit is None else min(self.limit, len(self))):
            self.epoch, self.position = self.epoch + 1, 0


def seed_worker(worker_id: int) -> None:
    """Seed NumPy and `random` in a worker with PyTorch's seed, which differs in every worker and epoch."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def shard_stream(dataset: Any, index: int, count: int) -> None:
    """Restrict a stream, or each stream of a chain, to every `count`-th of its `valid_ids` from `index` on."""
    for stream in getattr(dataset, "datasets", [dataset]):
        ids = getattr(stream, "valid_ids", None)
        if ids is not None:
            stream.sample_ids = [ids[i] for i in range(index, len(ids), count)]


@dataclass(frozen=True)
class StreamWorkerInit:
    """`worker_init_fn` that seeds a worker and restricts it to its own shard of a stream.

    Args:
        rank, replicas: index of this process, and number of processes.
    """

    rank: int
    replicas: int

    def __call__(self, worker_id: int) -> None:
        seed_worker(worker_id)
        worker = get_worker_info()
        index = self.rank * worker.num_workers + worker_id
        shard_stream(worker.dataset, index, self.replicas * worker.num_workers)
