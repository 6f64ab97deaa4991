"""Tests of the result cache: results are reused for the same unmodified tensors only."""

from __future__ import annotations

import torch

from ldm.modules.cached import ResultCache


class Counter:
    """Computation that counts its calls and returns the count."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.calls


def test_same_tensors_return_the_cached_result():
    compute, cache, a, b = Counter(), ResultCache(), torch.zeros(2), torch.zeros(2)
    assert [cache(compute, a, b) for _ in range(3)] == [1, 1, 1]
    assert compute.calls == 1


def test_other_tensors_are_recomputed_even_if_equal():
    compute, cache, a, b = Counter(), ResultCache(), torch.zeros(2), torch.zeros(2)
    assert [cache(compute, *sources) for sources in ((a,), (b,), (a, b), (b, a), (b, a), ())] == [1, 2, 3, 4, 4, 5]


def test_modified_tensor_is_recomputed():
    compute, cache, a = Counter(), ResultCache(), torch.zeros(2)
    cache(compute, a)
    a[0] = 1
    assert cache(compute, a) == 2
    assert cache(compute, a) == 2


def test_inference_tensors_are_not_cached():
    with torch.inference_mode():
        compute, cache, a = Counter(), ResultCache(), torch.zeros(2)
        assert [cache(compute, a), cache(compute, a)] == [1, 2]


def test_new_tensor_does_not_reuse_the_identity_of_a_freed_one():
    compute, cache = Counter(), ResultCache()
    for number in range(1, 20):
        assert cache(compute, torch.zeros(2)) == number
