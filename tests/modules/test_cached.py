"""A kept result is given again for the same tensors only."""

from __future__ import annotations

import torch

from ldm.modules.cached import Cached


class Counting:
    """A computation that counts how often it is made."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return self.made


def test_the_same_tensors_give_the_same_result():
    make, kept, a, b = Counting(), Cached(), torch.zeros(2), torch.zeros(2)
    assert [kept(make, a, b) for _ in range(3)] == [1, 1, 1]
    assert make.made == 1


def test_other_tensors_give_another_even_if_they_are_equal():
    make, kept, a, b = Counting(), Cached(), torch.zeros(2), torch.zeros(2)
    assert [kept(make, *sources) for sources in ((a,), (b,), (a, b), (b, a), (b, a), ())] == [1, 2, 3, 4, 4, 5]


def test_a_tensor_that_was_written_to_is_another():
    make, kept, a = Counting(), Cached(), torch.zeros(2)
    kept(make, a)
    a[0] = 1
    assert kept(make, a) == 2
    assert kept(make, a) == 2


def test_what_does_not_count_its_changes_is_not_kept():
    with torch.inference_mode():
        make, kept, a = Counting(), Cached(), torch.zeros(2)
        assert [kept(make, a), kept(make, a)] == [1, 2]


def test_a_new_tensor_cannot_take_the_place_of_one_that_is_gone():
    make, kept = Counting(), Cached()
    for number in range(1, 20):
        assert kept(make, torch.zeros(2)) == number
