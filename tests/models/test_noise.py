"""Noise belongs to pictures, whatever batch they are in."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.noise import SeededNoise

SHAPE = (3, 4, 5)
SEEDS = [7, 8, 9, 2**63 - 1]


def test_a_picture_has_the_same_noise_in_every_batch():
    together = SeededNoise(SEEDS)
    alone = [SeededNoise([seed]) for seed in SEEDS]
    for _ in range(3):
        whole = together((len(SEEDS), *SHAPE))
        for i, each in enumerate(alone):
            assert torch.equal(whole[i : i + 1], each((1, *SHAPE)))


def test_one_picture_has_the_noise_of_torchs_generator():
    torch.manual_seed(7)
    assert torch.equal(SeededNoise([7])((1, *SHAPE)), torch.randn(1, *SHAPE))


def test_it_is_standard_normal():
    noise = SeededNoise(range(8))((8, 64, 64))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    SeededNoise(SEEDS)((4, *SHAPE))
    assert torch.equal(torch.randn(3), expected)


def test_a_batch_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="noise for 4 pictures was asked for a batch of 3"):
        SeededNoise(SEEDS)((3, *SHAPE))
