"""Order, shards and position of the training loader."""

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

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


@pytest.mark.parametrize(("size", "replicas"), [(10, 3), (12, 4), (2, 3)])
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
