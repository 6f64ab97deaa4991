"""Agreement of the figures with torch-fidelity, torchmetrics and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from feature_networks import TinyNetwork, random_images
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ldm.errors import UserError
from ldm.evaluation import moments as moments_module
from ldm.evaluation.features import SetFeatures
from ldm.evaluation.moments import Gaussian, Moments
from ldm.evaluation.scores import (
    Figure,
    Settings,
    check_count,
    fid,
    inception_score,
    kid,
    precision_recall,
    score,
)


def rows(count: int, columns: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, columns)) + shift).astype(np.float32)


def gaussian(features: np.ndarray, batch: int = 7) -> Gaussian:
    moments = Moments()
    for start in range(0, len(features), batch):
        moments.add(features[start : start + batch])
    return moments.gaussian()


def outputs(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features, logits = TinyNetwork()(torch.from_numpy(images).permute(0, 3, 1, 2))
    return features.numpy(), logits.numpy()


def test_fid_agrees_with_torch_fidelity():
    first, second = rows(200, 12, 0), rows(150, 12, 1, shift=0.3)
    statistics = [fid_features_to_statistics(torch.from_numpy(each).double()) for each in (first, second)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert fid(gaussian(first), gaussian(second)) == pytest.approx(expected, abs=1e-6)


def test_inception_score_agrees_with_torch_fidelity():
    logits = rows(203, 9, 0)
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020)
    found = inception_score(logits, 10)
    assert found.value == pytest.approx(expected["inception_score_mean"], abs=1e-6)
    assert found.deviation == pytest.approx(expected["inception_score_std"], abs=1e-6)


def test_kid_and_precision_agree_with_torch_fidelity():
    first, second = rows(120, 8, 0), rows(90, 8, 1, shift=0.5)
    tensors = torch.from_numpy(first), torch.from_numpy(second)
    expected = kid_features_to_metric(*tensors, kid_subsets=6, kid_subset_size=50, rng_seed=2020, verbose=False)
    found = kid(first, second, 6, 50)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], abs=1e-6)
    assert found.deviation == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-6)
    expected = prc_features_to_metric(*tensors, verbose=False)
    assert precision_recall(first, second) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


class OneOutput(nn.Module):
    """One of the outputs of the tiny network, in the form that torchmetrics takes."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.network, self.index = TinyNetwork(), index
        self.num_features = 6 if index == 0 else 4

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[self.index]


def test_figures_agree_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    samples, reference = random_images(60, 1), random_images(50, 2)
    features, others = outputs(samples), outputs(reference)
    tensors = [torch.from_numpy(each).permute(0, 3, 1, 2) for each in (samples, reference)]
    distance = FrechetInceptionDistance(OneOutput(0), input_img_size=(3, 16, 16))
    kernel = KernelInceptionDistance(OneOutput(0), subsets=1, subset_size=50)
    for metric in (distance, kernel):
        metric.update(tensors[1], real=True)
        metric.update(tensors[0][:50] if metric is kernel else tensors[0], real=False)
    assert fid(gaussian(features[0]), gaussian(others[0])) == pytest.approx(float(distance.compute()), abs=1e-6)
    assert kid(features[0][:50], others[0], 1, 50).value == pytest.approx(float(kernel.compute()[0]), abs=1e-4)
    inception = InceptionScore(OneOutput(1), splits=1)
    inception.update(tensors[0])
    assert inception_score(features[1], 1).value == pytest.approx(float(inception.compute()[0]), abs=1e-6)


def test_fid_of_gaussians_is_the_closed_form():
    """FID of N(m, diag a²) and N(0, diag b²) is |m|² + Σ (a - b)²."""
    a, b, m = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5]), np.array([1.0, -0.5, 2.0])
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(100_000, 3)) * scale for scale in (a, b))
    expected = float(m @ m + np.square(a - b).sum())
    assert fid(gaussian(first + m, 10_000), gaussian(second, 10_000)) == pytest.approx(expected, rel=0.01)


def test_inception_score_of_certain_and_uncertain_logits():
    """The score is the number of classes for certain, evenly spread logits, and 1 for equal ones."""
    certain = np.tile(40.0 * np.eye(5, dtype=np.float32), (400, 1))
    assert inception_score(certain, 1).value == pytest.approx(5.0, rel=1e-6)
    assert inception_score(np.zeros((40, 5), np.float32), 4) == Figure(pytest.approx(1.0), pytest.approx(0.0))


def test_kid_is_the_unbiased_estimate():
    first, second = rows(5, 3, 0).astype(np.float64), rows(5, 3, 1).astype(np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(kernel(x[i], x[j]) for x in (first, second) for i, j in pairs) / 20
    expected -= 2 * sum(kernel(x, y) for x in first for y in second) / 25
    assert kid(first, second, 2, 5).value == pytest.approx(expected, abs=1e-9)


def test_precision_and_recall_of_equal_and_distant_sets():
    first = rows(30, 4, 0)
    assert precision_recall(first, first) == (1.0, 1.0)
    assert precision_recall(first, first + 100.0) == (0.0, 0.0)


def test_precision_is_about_samples_and_recall_about_the_reference():
    wide, narrow = rows(300, 2, 0) * 4.0, rows(300, 2, 1) * 0.2
    precision, recall = precision_recall(narrow, wide)
    assert precision > 0.9
    assert recall < 0.2


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_moments_are_those_of_numpy_in_any_batches(monkeypatch, block):
    monkeypatch.setattr(moments_module, "BLOCK", block)
    features = rows(101, 5, 3, shift=50.0)
    for batch in (1, 10, 101):
        found = gaussian(features, batch)
        assert found.count == 101
        np.testing.assert_allclose(found.mu, features.astype(np.float64).mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.sigma, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_moments_of_one_row_have_no_covariance():
    moments = Moments()
    moments.add(rows(1, 3, 0))
    with pytest.raises(ValueError, match="at least two rows, not 1"):
        moments.gaussian()


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        (Settings(("fid",)), 8, "FID needs more images than the 8 features, but X has 8; give more images, or .*few"),
        (Settings(("fid",), allow_few=True), 1, "FID needs more images than the 8 features, but X has 1"),
        (Settings(("kid",)), 999, "subsets of 1000 images, but X has 999; give a smaller --kid-subset-size"),
        (Settings(("is",)), 9, "IS uses 10 splits, but X has 9 images; give fewer --is-splits"),
        (Settings(("prc",)), 3, "need more than 3 images, but X has 3"),
    ],
)
def test_too_few_images_raise_user_error(settings, count, message):
    with pytest.raises(UserError, match=message):
        check_count(settings, "X", count, 8)


def test_enough_images_pass():
    check_count(Settings(("fid",)), "X", 9, 8)
    check_count(Settings(("fid",), allow_few=True), "X", 2, 8)
    check_count(Settings(("kid", "is", "prc"), subset_size=10), "X", 10, 8)


def test_statistics_without_images_have_no_kid():
    features = SetFeatures(gaussian(rows(9, 3, 0)), 9, None, "", features=rows(9, 3, 0))
    statistics = SetFeatures(features.gaussian, None, None, "")
    with pytest.raises(UserError, match="need the images of the reference, not statistics"):
        score(features, statistics, Settings(("kid",), subset_size=5))
    assert score(features, statistics, Settings(("fid",)))["fid"].value == pytest.approx(0.0, abs=1e-6)


def test_statistics_of_another_network_raise_user_error():
    with pytest.raises(UserError, match="equal numbers of features, not 3 and 4; the reference comes from another"):
        fid(gaussian(rows(9, 3, 0)), gaussian(rows(9, 4, 0)))
