"""FID, KID, IS, precision and recall of features, computed by torch-fidelity."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm.errors import UserError
from ldm.evaluation.features import SetFeatures
from ldm.evaluation.moments import Gaussian

METRICS = ("fid", "kid", "is", "prc")
NEIGHBOURS = 3  # of precision and recall, as in ADM
CHUNK = 1000  # rows of a block of distances
SEED = 2020  # torch-fidelity's, of the order of IS and of the subsets of KID


@dataclass(frozen=True)
class Figure:
    """Value of a metric, with its deviation if it has one: over the splits of IS, the subsets of KID, or the images."""

    value: float
    deviation: float | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of the metrics.

    Attributes:
        metrics: some of `METRICS`; "prc" is precision and recall.
        splits: parts of the images for IS.
        subsets: number of random subsets for KID.
        subset_size: images of such a subset.
        allow_few: compute FID also of fewer images than features.
    """

    metrics: tuple[str, ...] = METRICS
    splits: int = 10
    subsets: int = 100
    subset_size: int = 1000
    allow_few: bool = False

    def protocol(self) -> dict[str, Any]:
        """Return the settings that the figures depend on."""
        found: dict[str, Any] = {}
        if "kid" in self.metrics:
            found["kid"] = {"subsets": self.subsets, "subset_size": self.subset_size, "seed": SEED}
        if "is" in self.metrics:
            found["is"] = {"splits": self.splits, "seed": SEED}
        if "prc" in self.metrics:
            found["prc"] = {"neighbours": NEIGHBOURS}
        return found


def fid(first: Gaussian, second: Gaussian) -> float:
    """Return the Fréchet distance of two Gaussians by torch-fidelity.

    Raises:
        UserError: they have different numbers of features.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if first.mu.shape != second.mu.shape:
        raise UserError(
            f"FID compares equal numbers of features, not {len(first.mu)} and {len(second.mu)}; the reference comes "
            "from another feature network"
        )
    statistics = [{"mu": each.mu, "sigma": each.sigma} for each in (first, second)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def inception_score(logits: np.ndarray, splits: int) -> Figure:
    """Return the inception score of logits (N, C): mean and deviation over splits of a random order.

    Each split is computed on its own, so that the memory for float64 values is that of one split.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    count = len(logits)
    order = np.random.RandomState(SEED).permutation(count)
    scores = []
    for number in range(splits):
        rows = order[number * count // splits : (number + 1) * count // splits]
        part = torch.from_numpy(np.ascontiguousarray(logits[rows]))
        scores.append(isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN])
    return Figure(float(np.mean(scores)), float(np.std(scores)))


def kid(first: np.ndarray, second: np.ndarray, subsets: int, subset_size: int) -> Figure:
    """Return the kernel distance of features: mean and deviation over random subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(first),
        torch.from_numpy(second),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=SEED,
        verbose=False,
    )
    return Figure(float(found[KEY_METRIC_KID_MEAN]), float(found[KEY_METRIC_KID_STD]))


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return precision and recall of features of samples against those of a reference (arXiv:1904.06991)."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    with contextlib.redirect_stdout(None):
        found = prc_features_to_metric(
            torch.from_numpy(samples).to(device),
            torch.from_numpy(reference).to(device),
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=CHUNK,
            save_cpu_ram=True,
            verbose=False,
        )
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])


def check_counts(settings: Settings, sets: Collection[tuple[str, SetFeatures]]) -> None:
    """Raise an error if a set has too few images for a metric.

    Raises:
        UserError: it has fewer images than features (FID), than a subset (KID), than splits (IS) or than neighbours.
    """
    for name, each in sets:
        if each.count is None:
            continue
        check_count(settings, name, each.count, each.dimension or 0)


def check_count(settings: Settings, name: str, count: int, dimension: int) -> None:
    """Raise an error if `count` images are too few for a metric; see `check_counts`."""
    if "fid" in settings.metrics and (count < 2 or (count <= dimension and not settings.allow_few)):
        advice = "" if count < 2 else ", or compute it nevertheless with --allow-few"
        raise UserError(
            f"FID needs more images than the {dimension} features, but {name} has {count}; give more images{advice}"
        )
    if "kid" in settings.metrics and count < settings.subset_size:
        raise UserError(
            f"KID uses subsets of {settings.subset_size} images, but {name} has {count}; give a smaller "
            "--kid-subset-size, or leave out kid"
        )
    if "is" in settings.metrics and count < settings.splits:
        raise UserError(f"IS uses {settings.splits} splits, but {name} has {count} images; give fewer --is-splits")
    if "prc" in settings.metrics and count <= NEIGHBOURS:
        raise UserError(f"precision and recall need more than {NEIGHBOURS} images, but {name} has {count}")


def score(
    samples: SetFeatures, reference: SetFeatures, settings: Settings, device: torch.device | str = "cpu"
) -> dict[str, Figure]:
    """Return the metrics of the settings.

    Args:
        samples: features of the samples.
        reference: those of the reference; its features are needed for KID, precision and recall.
        settings: the metrics and their settings.
        device: where distances between features are computed.

    Raises:
        UserError: the reference has no features although a metric needs them.
    """
    found: dict[str, Figure] = {}
    if "fid" in settings.metrics:
        assert samples.gaussian is not None and reference.gaussian is not None
        found["fid"] = Figure(fid(samples.gaussian, reference.gaussian))
    if {"kid", "prc"} & {*settings.metrics} and (reference.features is None or samples.features is None):
        raise UserError(
            "KID, precision and recall need the images of the reference, not statistics; choose --metrics fid,is"
        )
    if "kid" in settings.metrics:
        assert samples.features is not None and reference.features is not None
        found["kid"] = kid(samples.features, reference.features, settings.subsets, settings.subset_size)
    if "is" in settings.metrics:
        assert samples.logits is not None
        found["is"] = inception_score(samples.logits, settings.splits)
    if "prc" in settings.metrics:
        assert samples.features is not None and reference.features is not None
        precision, recall = precision_recall(samples.features, reference.features, device)
        found["precision"], found["recall"] = Figure(precision), Figure(recall)
    return found
