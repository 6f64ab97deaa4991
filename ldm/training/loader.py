"""A data loader whose order depends on the seed alone and which continues in the middle of an epoch."""

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
    """Lists of indices; every pass over the data has its own order, a function of the seed and its number.

    Args:
        size: of the data set.
        batch_size: of each list; the last one may be shorter.
        shuffle: or keep the order.
        seed: of the orders.
        rank, replicas: this process takes every `replicas`-th index from `rank` on, padded to equal counts.
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
        mine = order[self.rank :: self.replicas]
        for first in range(self.start * self.batch_size, len(mine), self.batch_size):
            yield mine[first : first + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.size / self.replicas) / self.batch_size)


class ResumableLoader(DataLoader):
    """A loader that knows its epoch and position, which Lightning keeps in checkpoints.

    Args:
        dataset: iterable ones keep their own order and restart from their beginning.
        limit: batches that the trainer takes of an epoch, when fewer than there are.
        shuffle, seed, rank, replicas: as `EpochBatches`.
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
        # Its own generator, so that starting an epoch takes nothing from the global random numbers.
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
        # Lightning may begin an epoch twice; only one that gave a batch is over.
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
        """Where it stands: the epoch, how many of its batches were handed out, and the seed of its orders."""
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there; the next iteration gives what is left of the epoch, or the next one."""
        self.epoch, self.position, self.seed = state["epoch"], state["position"], state["seed"]
        if self.batches is None:
            self.position = 0
        elif self.position >= (len(self) if self.limit is None else min(self.limit, len(self))):
            self.epoch, self.position = self.epoch + 1, 0


def seed_worker(worker_id: int) -> None:
    """Seed a worker's NumPy and `random`, as PyTorch seeds its own numbers: differently in each and every epoch."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def narrow(dataset: Any, part: int, parts: int) -> None:
    """Leave a stream, or each one in a chain, every `parts`-th of its `valid_ids`, from number `part` on."""
    for stream in getattr(dataset, "datasets", [dataset]):
        ids = getattr(stream, "valid_ids", None)
        if ids is not None:
            stream.sample_ids = [ids[index] for index in range(part, len(ids), parts)]


@dataclass(frozen=True)
class ShareRecords:
    """A `worker_init_fn` that also gives each worker of each process its own part of a stream's records."""

    rank: int
    replicas: int

    def __call__(self, worker_id: int) -> None:
        seed_worker(worker_id)
        worker = get_worker_info()
        part = self.rank * worker.num_workers + worker_id
        narrow(worker.dataset, part, self.replicas * worker.num_workers)
