"""Order, shards and position of the training loader."""

import cv2
import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import IterableDataset

from ldm.errors import UserError
from ldm.training import loader as loader_module
from ldm.training.loader import EpochBatches, ResumableLoader, StreamWorkerInit, seed_worker, shard_stream


def epochs(loader, count):
    return [[batch.tolist() for batch in loader] for _ in range(count)]


def flat(lists):
    return [item for sublist in lists for item in sublist]


def test_order_depends_on_epoch_and_seed():
    data = list(range(10))
    first, second = epochs(ResumableLoader(data, 4, shuffle=True, seed=1), 2)
    assert sorted(flat(first)) == sorted(flat(second)) == data
    assert first != second
    assert epochs(ResumableLoader(data, 4, shuffle=True, seed=1), 2) == [first, second]
    assert epochs(ResumableLoader(data, 4, shuffle=True, seed=2), 1) != [first]
    assert epochs(ResumableLoader(data, 4), 1) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]


def test_iteration_leaves_global_generator_unchanged():
    state = torch.get_rng_state()
    epochs(ResumableLoader(list(range(6)), 2, shuffle=True), 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 2, 5, 7])
def test_loader_resumes_from_state(taken, workers):
    def make(seed=3):
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        return ResumableLoader(list(range(10)), 2, shuffle=True, seed=seed, **options)

    whole = flat(epochs(make(), 3))
    stopped = make()
    seen = []
    while len(seen) < taken:
        for batch in stopped:
            seen.append(batch.tolist())
            if len(seen) == taken:
                break
    continued = make(seed=3 if taken == 0 else 4)  # the seed comes from the checkpoint
    if taken:
        continued.load_state_dict(stopped.state_dict())
    while len(seen) < len(whole):
        seen += epochs(continued, 1)[0]
    assert seen == whole


def test_epoch_limited_by_trainer_counts_as_finished():
    loader = ResumableLoader(list(range(10)), 2, shuffle=True, limit=3)
    loader.load_state_dict({"epoch": 0, "position": 3, "seed": 0})
    reference = epochs(ResumableLoader(list(range(10)), 2, shuffle=True), 2)[1]
    assert epochs(loader, 1) == [reference]


@pytest.mark.parametrize(("size", "replicas"), [(10, 3), (12, 4), (2, 3), (1, 3), (2, 7)])
def test_processes_get_equal_shares(size, replicas):
    shares = [EpochBatches(size, 2, True, 0, rank, replicas) for rank in range(replicas)]
    batches = [list(share) for share in shares]
    assert {len(share) for share in batches} == {len(shares[0])}
    assert {index for share in batches for batch in share for index in batch} == set(range(size))


class Stream(IterableDataset):
    valid_ids = tuple(range(10))
    sample_ids = valid_ids

    def __iter__(self):
        return iter(self.sample_ids)


def test_workers_share_all_records_of_a_stream():
    options = {"num_workers": 3, "worker_init_fn": StreamWorkerInit(0, 1)}
    batches = flat(epochs(ResumableLoader(Stream(), 2, **options), 1)[0])
    assert sorted(batches) == list(range(10))


def test_processes_get_different_records_of_a_stream():
    seen = []
    for rank in range(2):
        options = {"num_workers": 2, "worker_init_fn": StreamWorkerInit(rank, 2)}
        seen += flat(epochs(ResumableLoader(Stream(), 5, **options), 1)[0])
    assert sorted(seen) == list(range(10))


def test_each_chained_stream_is_sharded():
    chain = Stream() + Stream()
    shard_stream(chain, 1, 4)
    assert list(chain) == [1, 5, 9, 1, 5, 9]


class OpenCVThreads:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return cv2.getNumThreads()


def test_opencv_has_no_threads_in_a_worker():
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        assert cv2.getNumThreads() == 3
        loader = ResumableLoader(OpenCVThreads(), 1, num_workers=2, worker_init_fn=seed_worker)
        assert flat(epochs(loader, 1)[0]) == [1] * 4
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


class RandomNumbers:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return np.random.rand()


def test_random_numbers_differ_by_worker_and_epoch():
    def numbers():
        loader = ResumableLoader(RandomNumbers(), 1, num_workers=2, worker_init_fn=seed_worker)
        return flat(flat(epochs(loader, 2)))

    first = numbers()
    assert len(set(first)) == 8
    assert first == numbers()


@pytest.mark.parametrize(("batch_size", "replicas", "first"), [(4, 1, 8), (3, 1, 6), (1, 2, 8), (8, 1, 8)])
def test_epoch_resumes_at_the_same_item_with_another_batch_size(batch_size, replicas, first):
    stopped = ResumableLoader(range(20), 2, shuffle=False)
    for _ in zip(range(4), stopped, strict=False):
        pass
    continued = ResumableLoader(range(20), batch_size, shuffle=False, replicas=replicas)
    continued.load_state_dict(stopped.state_dict())
    assert next(iter(continued))[0] == first


@pytest.mark.parametrize(
    ("records", "replicas", "workers", "batch_size"),
    [(1, 3, 0, 2), (7, 2, 0, 3), (9, 2, 2, 2), (3, 4, 1, 1), (10, 2, 2, 5)],
)
def test_processes_get_equal_numbers_of_batches_of_a_stream(records, replicas, workers, batch_size, monkeypatch):
    """No record is left out. `len` is exact, because validation waits for the last batch."""
    monkeypatch.setattr(loader_module, "any_process", lambda *flags: flags)
    seen, counts = set(), set()
    for rank in range(replicas):
        stream = Stream()
        stream.valid_ids = stream.sample_ids = tuple(range(records))
        if workers == 0:
            shard_stream(stream, rank, replicas, batch_size)
        options = {"num_workers": workers, "worker_init_fn": StreamWorkerInit(rank, replicas, batch_size)}
        loader = ResumableLoader(stream, batch_size, rank=rank, replicas=replicas, **options)
        batches = epochs(loader, 1)[0]
        seen.update(flat(batches))
        counts.update({len(batches), len(loader)})
    assert seen == set(range(records))
    assert len(counts) == 1


def test_stream_ends_for_all_processes_when_it_ends_for_one(monkeypatch):
    """Its items may depend on the process, and a process with a batch more would wait for the others forever."""
    calls = []

    def any_process(flag):
        calls.append(flag)
        return (len(calls) == 3,)

    monkeypatch.setattr(loader_module, "any_process", any_process)
    assert epochs(ResumableLoader(Stream(), 2, replicas=2), 1) == [[[0, 1], [2, 3]]]
    assert calls == [False] * 3


class Once(IterableDataset):
    """Stream that returns the same iterator each time, so that it is empty from the second time on."""

    def __init__(self, size):
        self.items = list(range(size))

    def __iter__(self):
        items, self.items = self.items, []
        return iter(items)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_without_items_raises_user_error(workers):
    with pytest.raises(UserError, match=r"^data\.params\.train: Once returned no item; check its files and filters$"):
        epochs(ResumableLoader(Once(0), 2, name="data.params.train", num_workers=workers), 1)


def test_stream_that_cannot_start_again_raises_user_error():
    loader = ResumableLoader(Once(4), 2)
    assert epochs(loader, 1) == [[[0, 1], [2, 3]]]
    with pytest.raises(UserError, match="returned no item when it was read again; its __iter__ must start"):
        epochs(loader, 1)


class Promising(Stream):
    """Stream that is shorter than it says."""

    def __len__(self):
        return 20


def test_stream_shorter_than_its_length_is_a_warning(caplog):
    """The trainer validates after the batch whose number is `len`, which never comes."""
    loader = ResumableLoader(Promising(), 2, name="data.params.train")
    epochs(loader, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "data.params.train: Promising returned 5 batches, not 10 as its __len__ says; validation waits for the last one"
    ]
    caplog.clear()
    batches = iter(ResumableLoader(Promising(), 2))
    next(batches)
    del batches
    assert not caplog.records


class Damaged:
    """Data set of one item that cannot be read; with `in_worker` the error is as PyTorch passes it on from a worker."""

    def __init__(self, error, in_worker=False):
        self.error, self.in_worker = error, in_worker

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if not self.in_worker:
            raise self.error
        try:
            raise self.error
        except type(self.error):
            wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
        wrapper.reraise()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError('cannot read "a.png": it is damaged'), 'cannot read "a.png": it is damaged'),
        (FileNotFoundError(2, "No such file or directory", "a.png"), "[Errno 2] No such file or directory: 'a.png'"),
    ],
)
def test_error_in_a_worker_has_one_line(error, message):
    """PyTorch adds the traceback of the worker to it."""
    with pytest.raises(UserError) as raised:
        epochs(ResumableLoader(Damaged(error, in_worker=True), 1), 1)
    assert str(raised.value) == message
    with pytest.raises(type(error)) as raised:
        epochs(ResumableLoader(Damaged(error), 1), 1)
    assert raised.value is error


def test_other_errors_in_a_worker_keep_their_traceback():
    with pytest.raises(ZeroDivisionError, match="Original Traceback"):
        epochs(ResumableLoader(Damaged(ZeroDivisionError("on purpose"), in_worker=True), 1), 1)


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_workers_continue_their_random_numbers(taken):
    """The first worker of a resumed epoch may load the batches of another one; a batch that failed is loaded again."""

    def make():
        return ResumableLoader(RandomNumbers(), 1, num_workers=2, worker_init_fn=seed_worker)

    whole = flat(epochs(make(), 2))
    stopped = make()
    seen = [batch.tolist() for _, batch in zip(range(taken + 1), stopped, strict=False)][:taken]
    stopped.unread()
    continued = make()
    continued.load_state_dict(stopped.state_dict())
    assert seen + flat(epochs(continued, 2)) == whole


def test_stream_starts_again_after_a_finished_epoch():
    passes = []

    class Announced(Stream):
        def set_epoch(self, epoch, seed, start):
            passes.append((epoch, start))

    first = ResumableLoader(Announced(), 2)
    epochs(first, 1)
    first.end_epoch()
    continued = ResumableLoader(Announced(), 2)
    continued.load_state_dict(first.state_dict())
    epochs(continued, 2)
    assert passes == [(0, 0), (1, 0), (2, 0)]


def test_evaluation_depends_on_trained_epochs_and_not_on_earlier_passes():
    options = {"num_workers": 2, "worker_init_fn": seed_worker, "evaluates": True, "shuffle": True}
    loader = ResumableLoader(RandomNumbers(), 1, **options)
    first, second = epochs(loader, 2)
    loader.batches.sampler.set_epoch(1)
    assert first == second != epochs(loader, 1)[0]
