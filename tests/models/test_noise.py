"""Tests of seeded noise."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.noise import SeededNoise

SHAPE = (3, 4, 5)
SEEDS = [7, 8, 9, 2**63 - 1]


def test_noise_of_an_image_does_not_depend_on_batch():
    batch = SeededNoise(SEEDS)
    single = [SeededNoise([seed]) for seed in SEEDS]
    for _ in range(3):
        whole = batch((len(SEEDS), *SHAPE))
        for i, each in enumerate(single):
            assert torch.equal(whole[i : i + 1], each((1, *SHAPE)))


def test_noise_of_one_image_matches_torch_generator():
    torch.manual_seed(7)
    assert torch.equal(SeededNoise([7])((1, *SHAPE)), torch.randn(1, *SHAPE))


def test_noise_is_standard_normal():
    noise = SeededNoise(range(8))((8, 64, 64))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_global_generator_is_not_used():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    SeededNoise(SEEDS)((4, *SHAPE))
    assert torch.equal(torch.randn(3), expected)


def test_wrong_batch_size_raises_value_error():
    with pytest.raises(ValueError, match="4 seeds and cannot fill a batch of 3"):
        SeededNoise(SEEDS)((3, *SHAPE))


def test_start_seed_replaces_the_first_noise_of_an_image():
    noise, plain = SeededNoise([7, 8, 9], start_seeds=[7, None, 5]), SeededNoise([7, 8, 9])
    first, others = noise((3, *SHAPE)), [noise((3, *SHAPE)) for _ in range(2)]
    expected = [plain((3, *SHAPE)) for _ in range(3)]
    assert torch.equal(first[:2], expected[0][:2]) and torch.equal(first[2:], SeededNoise([5])((1, *SHAPE)))
    for each, following in zip(others, expected[1:], strict=True):
        assert torch.equal(each[:2], following[:2])
    own = SeededNoise([9])
    assert [torch.equal(each[2:], own((1, *SHAPE))) for each in others] == [True, True], "its own noise from the start"
