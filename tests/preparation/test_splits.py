"""Tests of `ldm.preparation.splits`."""

from __future__ import annotations

from collections import Counter

import pytest

from ldm.preparation.splits import MOST_VALIDATION, split


def test_the_split_is_a_partition_of_the_wanted_share():
    groups = [f"digest {number}" for number in range(200)]
    train, validation = split(groups, 0.1)
    assert len(validation) == 20 and sorted([*train, *validation]) == list(range(200))
    assert split(groups, 0.1) == (train, validation)


def test_the_order_of_the_images_has_no_effect():
    groups = [f"digest {number}" for number in range(60)]
    chosen = {groups[index] for index in split(groups, 0.2)[1]}
    backwards = groups[::-1]
    assert {backwards[index] for index in split(backwards, 0.2)[1]} == chosen


def test_copies_are_on_one_side():
    groups = [f"digest {number // 3}" for number in range(90)]
    train, validation = split(groups, 0.2)
    assert len(validation) == 18
    assert not {groups[index] for index in train} & {groups[index] for index in validation}


def test_every_class_keeps_an_image_for_training():
    classes = ["rare"] * 2 + ["single"] + ["usual"] * 27
    groups = [f"digest {number}" for number in range(30)]
    train, validation = split(groups, 0.9, classes)
    assert set(Counter(classes[index] for index in train)) == {"rare", "single", "usual"}
    assert len(validation) == 27


@pytest.mark.parametrize(("count", "fraction", "expected"), [(10, 0.0, 0), (10, 0.01, 1), (2, 0.9, 1), (3, 0.99, 2)])
def test_both_sides_have_an_image_unless_the_share_is_zero(count, fraction, expected):
    train, validation = split([f"digest {number}" for number in range(count)], fraction)
    assert len(validation) == expected and len(train) == count - expected


def test_images_that_are_all_equal_are_for_training():
    assert split(["a"] * 5, 0.2) == ([0, 1, 2, 3, 4], [])


def test_the_validation_set_is_bounded():
    assert len(split([str(number) for number in range(100_000)], 0.05)[1]) == MOST_VALIDATION
