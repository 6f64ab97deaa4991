"""Data loader whose order depends on the seed alone and which resumes in the middle of an epoch."""

from __future__ import annotations

import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from ldm.data.unreadable import report_unreadable
from ldm.errors import UserError
from ldm.training.collate import Collate
from ldm.training.processes import any_process
from ldm.training.rng import as_arrays, as_tensors, rng_state, set_rng_state
from ldm.training.signals import leave_signals_to_main_process

logger = logging.getLogger(__name__)

END = object()  # after the last batch


def length_of(dataset: Any) -> int | None:
    """Return the number of items of a data set, or None if it has no length, as many streams."""
    try:
        return len(dataset)
    except TypeError:
        return None


class TrainedEpochs:
    """Number of trained epochs, which Lightning sets before each pass through its method `set_epoch`."""

    def __init__(self) -> None:
        self.count = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number."""
        self.count = epoch


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
        self.sampler = TrainedEpochs()

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist() if self.shuffle else list(range(self.size))
        order = [*order, *padding(order, self.replicas)]
        indices = order[self.rank :: self.replicas]
        for first in range(self.start * self.batch_size, len(indices), self.batch_size):
            yield indices[first : first + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.size / self.replicas) / self.batch_size)


def padding(items: Sequence[Any], count: int) -> list[Any]:
    """Return the items that repeat `items`, from the first on, until the number of all is a multiple of `count`."""
    return [items[i % len(items)] for i in range(-len(items) % count)] if len(items) else []


class ResumableLoader(DataLoader):
    """Data loader that tracks its epoch and position, which Lightning saves in checkpoints.

    All processes of a run receive the same number of batches. A stream ends for all when it ends for one of them.

    Args:
        dataset: the data set; an iterable one keeps its own order and restarts from its beginning. If it has a method
            `set_epoch`, this is called with the epoch, the seed and the position of a resumed run before each pass.
        batch_size: number of items in a batch.
        limit: number of batches that the trainer uses of an epoch, if it does not use all.
        name: name of the data set in messages, such as "data.params.train".
        evaluates: the passes evaluate a model: their order and random numbers depend on the number of trained epochs,
            and not on the number of passes, so that a resumed run repeats them.
        shuffle, seed, rank, replicas: see `EpochBatches`.
        options: further arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        replicas: int = 1,
        limit: int | None = None,
        name: str = "the data set",
        evaluates: bool = False,
        **options: Any,
    ) -> None:
        # With its own generator, the start of an epoch leaves PyTorch's global generator unchanged.
        options["generator"] = torch.Generator()
        options.setdefault("collate_fn", Collate(name))
        has_new_workers = options.get("num_workers", 0) > 0 and not options.get("persistent_workers")
        self._has_states = has_new_workers and not evaluates and not isinstance(dataset, IterableDataset)
        if self._has_states:
            options["collate_fn"] = WithState(options["collate_fn"])
            options["worker_init_fn"] = self._start = WorkerStart(options.get("worker_init_fn"))
        if isinstance(dataset, IterableDataset):
            super().__init__(dataset, batch_size=batch_size, **options)
            self.batches = None
        else:
            self.batches = EpochBatches(len(dataset), batch_size, shuffle, seed, rank, replicas)
            super().__init__(dataset, batch_sampler=self.batches, **options)
        self.seed, self.limit, self.name, self.replicas = seed, limit, name, replicas
        self._items = batch_size * replicas
        self.epoch, self.position, self._used = 0, 0, False
        self._is_short, self._evaluates = False, evaluates
        self._resumed_at = 0  # batches of this epoch that a stream returned before the run was resumed
        # Random states of the workers after their latest batch, by the number of the batch modulo that of the workers.
        self._states: dict[int, WorkerState] = {}
        self._replaced: tuple[int, WorkerState | None] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # torch states a private class
        # Lightning may start an epoch twice; the epoch is over only if it returned a batch.
        self.end_epoch()
        if self._evaluates and self.batches is not None:
            self.epoch = self.batches.sampler.count
        if self._has_states:
            self._start.first, self._start.states = self.position, dict(self._states)
        if self.batches is not None:
            self.batches.epoch, self.batches.start, self.batches.seed = self.epoch, self.position, self.seed
        for stream in _streams(self.dataset):
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(self.epoch, self.seed, self._resumed_at)
        self.generator.manual_seed(self.seed + self.epoch)
        return self._counted(super().__iter__())

    def __len__(self) -> int:
        if self.batches is None:
            count = shared_length(self.dataset, self.batch_size or 1, self.replicas, self.num_workers)
            return super().__len__() if count is None else count
        return super().__len__()

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Iterate over batches and count them.

        Raises:
            UserError: an item cannot be read, or there is none.
        """
        while (batch := self._next(batches)) is not END:
            if self._has_states:
                batch, state = batch
                worker = self.position % self.num_workers
                self._replaced, self._states[worker] = (worker, self._states.get(worker)), state
            self.position, self._used = self.position + 1, True
            yield batch
        if self.position == 0:
            self._raise_empty()
        if self.batches is None:
            self._check_length()
        report_unreadable(self.dataset, self.name)

    def _raise_empty(self) -> NoReturn:
        kind = type(self.dataset).__name__
        if self.epoch == 0:
            raise UserError(f"{self.name}: {kind} returned no item; check its files and filters")
        raise UserError(
            f"{self.name}: {kind} returned no item when it was read again; its __iter__ must start from the first item "
            "each time"
        )

    def _check_length(self) -> None:
        """Warn once if a stream was shorter than it says, because the trainer validates after its last batch."""
        promised = length_of(self)
        if promised is not None and self.position < promised and not self._is_short:
            self._is_short = True
            logger.warning(
                "%s: %s returned %d batches, not %d as its __len__ says; validation waits for the last one",
                *(self.name, type(self.dataset).__name__, self.position, promised),
            )

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, or `END` when this process, or for a stream any process, has no more."""
        try:
            batch = next(batches, END)
        except (UserError, OSError) as error:
            reason = worker_error(error)
            if reason is None:
                raise
            raise UserError(reason) from error
        if self.batches is not None or self.replicas == 1:
            return batch
        (is_over,) = any_process(batch is END)
        return END if is_over else batch

    def unread(self) -> None:
        """Take back the latest batch, which a resumed run returns again."""
        self.position -= 1
        if self._replaced is not None:
            worker, state = self._replaced
            self._states.pop(worker)
            if state is not None:
                self._states[worker] = state
            self._replaced = None

    def end_epoch(self) -> None:
        """Let the next pass be that of the next epoch, as after a pass without a limit."""
        if self._used:
            self.epoch, self.position, self._used, self._resumed_at = self.epoch + 1, 0, False, 0
            self._states, self._replaced = {}, None

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, number of batches returned in it, their items in all processes, seed and states of workers."""
        state: dict[str, Any] = {"epoch": self.epoch, "position": self.position, "seed": self.seed}
        state["items"] = self._items
        if self._resumed_at:
            state["resumed_at"] = self._resumed_at
        if self._states:
            state["workers"] = {"count": self.num_workers}
            state["workers"]["states"] = {n: as_tensors(state.arrays) for n, state in self._states.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore epoch, position and seed; the next iteration resumes the epoch or starts the next one.

        With the same number of workers and items in a batch, the workers continue their random numbers.
        """
        self.epoch, self.seed = state["epoch"], state["seed"]
        # With another batch size, the epoch resumes at the same item or, if that is within a batch, at its first one.
        self.position = state["position"] * state.get("items", self._items) // self._items
        workers = state.get("workers", {"count": 0})
        if self._has_states and workers["count"] == self.num_workers and self.position == state["position"]:
            self._states = {n: WorkerState(as_arrays(value)) for n, value in workers["states"].items()}
        if self.batches is None:
            self.position, self._resumed_at = 0, self.position + state.get("resumed_at", 0)
        elif self.position >= (len(self) if self.limit is None else min(self.limit, len(self))):
            self.epoch, self.position, self._states = self.epoch + 1, 0, {}


@dataclass(frozen=True)
class WorkerState:
    """Random state of a worker, from `as_arrays`; in an object, it is not copied to pinned memory."""

    arrays: dict[str, Any]


@dataclass(frozen=True)
class WithState:
    """`collate_fn` that adds the random state of the worker to each batch, from which a resumed run continues."""

    collate: Any

    def __call__(self, items: list[Any]) -> tuple[Any, WorkerState]:
        batch = self.collate(items)
        return batch, WorkerState(as_arrays(rng_state(devices=False)))


@dataclass
class WorkerStart:
    """`worker_init_fn` that continues the random numbers of the worker that would have loaded the same batches.

    Args:
        init: function that initializes a worker first.

    Attributes:
        first: number of the first batch to load; the workers load batches in turn, the first worker this one.
        states: random states of the workers of the interrupted run, see `ResumableLoader`.
    """

    init: Any
    first: int = 0
    states: dict[int, WorkerState] = field(default_factory=dict)

    def __call__(self, worker_id: int) -> None:
        worker: Any = get_worker_info()
        number = (self.first + worker_id) % worker.num_workers
        if number != worker_id:  # until its first batch, the worker has the seed of its number
            torch.manual_seed(torch.initial_seed() - worker_id + number)
        if self.init is not None:
            self.init(worker_id)
        if number in self.states:
            set_rng_state(as_tensors(self.states[number].arrays))


def worker_error(error: Exception) -> str | None:
    """Return the message of an error in a worker, which PyTorch wraps in a traceback; None for other errors."""
    text = str(error).rstrip()
    if not re.match(r"Caught \w+ in .*worker process", text):
        return None
    last_line = text.rpartition("\n")[2]
    return last_line.partition(": ")[2] or last_line


def seed_worker(worker_id: int) -> None:
    """Seed NumPy and `random` in a worker with PyTorch's seed, which differs in every worker and epoch.

    OpenCV runs in the worker alone: its threads would compete with those of the other workers.
    """
    import cv2

    cv2.setNumThreads(0)
    leave_signals_to_main_process()
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def shard_stream(dataset: Any, index: int, count: int, batch_size: int | None = None) -> None:
    """Restrict a stream, or each stream of a chain, to every `count`-th of its `valid_ids` from `index` on.

    A stream with a method `take_share(index, count)` divides itself.

    Args:
        dataset: the stream.
        index: index of the share.
        count: number of shares.
        batch_size: repeat ids if the shares would otherwise have different numbers of batches of this size.
    """
    for stream in _streams(dataset):
        ids = getattr(stream, "valid_ids", None)
        if hasattr(stream, "take_share"):
            stream.take_share(index, count)
        elif ids is not None:
            repeated = padding(ids, count) if batch_size and not _has_equal_batches(dataset, count, batch_size) else []
            ids = [*ids, *repeated]
            stream.sample_ids = [ids[i] for i in range(index, len(ids), count)]


def _has_equal_batches(dataset: Any, count: int, batch_size: int) -> bool:
    """Return whether all shares of a stream have the same number of batches."""
    sizes = [len(ids) for stream in _streams(dataset) if (ids := getattr(stream, "valid_ids", None)) is not None]
    shortest, longest = sum(size // count for size in sizes), sum(math.ceil(size / count) for size in sizes)
    return math.ceil(shortest / batch_size) == math.ceil(longest / batch_size)


def _streams(dataset: Any) -> Sequence[Any]:
    """Return the streams of a chain, or the stream itself."""
    return getattr(dataset, "datasets", [dataset])


def shared_length(dataset: Any, batch_size: int, replicas: int, workers: int) -> int | None:
    """Return the number of batches for each of several processes; None if the stream is not shared by its ids."""
    streams = _streams(dataset)
    sizes = [len(ids) for stream in streams if (ids := getattr(stream, "valid_ids", None)) is not None]
    if replicas == 1 or len(sizes) < len(streams):
        return None
    workers = max(1, workers)
    share = sum(math.ceil(size / (replicas * workers)) for size in sizes)
    return workers * math.ceil(share / batch_size)


@dataclass(frozen=True)
class StreamWorkerInit:
    """`worker_init_fn` that seeds a worker and restricts it to its own shard of a stream.

    Args:
        rank, replicas: index of this process, and number of processes.
        batch_size: see `shard_stream`; all processes get the same number of batches of this size.
    """

    rank: int
    replicas: int
    batch_size: int | None = None

    def __call__(self, worker_id: int) -> None:
        seed_worker(worker_id)
        worker: Any = get_worker_info()
        index = self.rank * worker.num_workers + worker_id
        batch_size = self.batch_size if self.replicas > 1 else None
        shard_stream(worker.dataset, index, self.replicas * worker.num_workers, batch_size)
