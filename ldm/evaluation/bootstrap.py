"""Bootstrap intervals of figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.evaluation.moments import Gaussian, Moments
from ldm.evaluation.scores import fid

LEVEL = 0.95
Z = 1.959964  # quantile of the normal distribution for an interval of 95 %

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean of `values`, at 95 %."""
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    means = [array[rng.integers(0, len(array), len(array))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference_interval(first: Sequence[float], second: Sequence[float], resamples: int, seed: int = 0) -> Interval:
    """Return the percentile interval of the mean of `second` - `first`, which belong to the same images, at 95 %."""
    return mean_interval((np.asarray(second) - np.asarray(first)).tolist(), resamples, seed)


def fid_interval(features: np.ndarray, reference: Gaussian, resamples: int, seed: int = 0) -> Interval:
    """Return an interval of FID at 95 %: the FID, plus and minus 1.96 bootstrap deviations of it.

    A resampled set repeats images and lacks others, which raises its FID. The percentiles of resampled sets would
    therefore not surround the FID, but their deviation is that of the FID.
    """
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    order = np.arange(len(features))
    values = []
    for number in tqdm(range(resamples + 1), desc="bootstrap of FID", disable=None, leave=False):
        moments = Moments()
        moments.add(features[order])
        values.append(fid(moments.gaussian(), reference))
        if number < resamples:
            order = rng.integers(0, len(features), len(features))
    deviation = float(np.std(values[1:], ddof=1))
    return values[0] - Z * deviation, values[0] + Z * deviation
