"""Tests of the image metrics against closed forms and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from ldm.pipelines.metrics import psnr


@pytest.mark.parametrize(("error", "expected"), [(0.2, 20.0), (0.02, 40.0)])
def test_psnr_has_its_closed_form(error, expected):
    assert psnr(np.zeros((4, 4, 3)), np.full((4, 4, 3), error), data_range=2.0) == pytest.approx(expected)


@pytest.mark.parametrize(("data_range", "dtype"), [(255.0, np.uint8), (2.0, np.float32)])
def test_psnr_agrees_with_torchmetrics(data_range, dtype):
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(2)]
    images = pixels if dtype == np.uint8 else [(each / 127.5 - 1.0).astype(np.float32) for each in pixels]
    tensors = [torch.from_numpy(image).double() for image in images]
    expected = peak_signal_noise_ratio(tensors[1], tensors[0], data_range=data_range)
    assert psnr(*images, data_range=data_range) == pytest.approx(float(expected), abs=1e-5)  # it sums in float32


def test_psnr_counts_the_selected_pixels_alone():
    reference = np.full((4, 4, 3), 100, np.uint8)
    image = reference.copy()
    image[0] += 10
    image[3] = 255
    where = np.zeros((4, 4), bool)
    where[:2] = True
    assert psnr(reference, image, where=where) == pytest.approx(10 * math.log10(255**2 / 50))


def test_psnr_does_not_wrap_around_in_uint8():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert psnr(black, white) == psnr(white, black) == pytest.approx(0)


def test_psnr_of_equal_images_is_the_limit():
    image = np.zeros((2, 2, 3))
    assert psnr(image, image) == math.inf and psnr(image, image, limit=100.0) == 100.0


def test_psnr_of_different_shapes_raises_value_error():
    with pytest.raises(ValueError, match="different shapes"):
        psnr(np.zeros((2, 2, 3)), np.zeros((2, 2, 1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_psnr_of_values_that_are_not_finite_raises_value_error(value):
    image = np.zeros((4, 4, 3))
    image[3] = value
    with pytest.raises(ValueError, match="not finite"):
        psnr(np.zeros((4, 4, 3)), image)
    where = np.zeros((4, 4), bool)
    where[0] = True
    assert psnr(np.ones((4, 4, 3)), image, data_range=1.0, where=where) == 0
