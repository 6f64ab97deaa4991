"""Streaming statistics in float64: means and covariances whose memory does not grow with the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 1000  # rows of one update


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mu: mean (D,) float64.
        sigma: covariance (D, D) float64, with the divisor N - 1.
        count: number of rows that they come from; None if it is not known.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None


class Moments:
    """Mean and covariance of rows that arrive in batches, by the pairwise update of Chan, Golub and LeVeque (1979).

    Rows wait until there are `BLOCK` of them, because an update takes as long as hundreds of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[np.ndarray] = []
        self._mean: np.ndarray | None = None
        self._scatter: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        """Add rows (B, D)."""
        if not len(rows):
            return
        self.count += len(rows)
        self._waiting.append(rows.copy())
        if sum(map(len, self._waiting)) >= BLOCK:
            self._update()

    def _update(self) -> None:
        """Add the rows that wait."""
        if not self._waiting:
            return
        rows = np.concatenate(self._waiting).astype(np.float64)
        self._waiting = []
        mean = rows.mean(axis=0)
        centred = rows - mean
        self.count -= len(rows)
        self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: Gaussian) -> None:
        """Add rows of which the mean, the covariance and the number are known."""
        assert other.count is not None
        self._update()
        self._merge(other.count, other.mu, other.sigma * max(other.count - 1, 1))

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean.copy(), scatter.copy()
            return
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self._mean += delta * (count / total)
        self.count = total

    def partial(self) -> Gaussian:
        """Return the mean and the covariance for `merge`; of a single row the covariance is 0."""
        self._update()
        assert self._mean is not None and self._scatter is not None
        return Gaussian(self._mean, self._scatter / max(self.count - 1, 1), self.count)

    def gaussian(self) -> Gaussian:
        """Return the mean and the covariance.

        Raises:
            ValueError: there are fewer than two rows.
        """
        self._update()
        if self._mean is None or self._scatter is None or self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, not {self.count}")
        return Gaussian(self._mean.copy(), self._scatter / (self.count - 1), self.count)


class ChannelMoments:
    """Mean and variance of each channel of latents that arrive in batches; a posterior adds its own variance."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | None = None
        self._squares: np.ndarray | None = None

    def add(self, latents: np.ndarray, variances: np.ndarray | None = None) -> None:
        """Add latents (B, C, h, w), which are means of posteriors if `variances` of the same shape are given."""
        rows = np.moveaxis(latents.astype(np.float64), 1, 0).reshape(latents.shape[1], -1)
        mean = rows.mean(axis=1)
        squares = np.square(rows - mean[:, None]).sum(axis=1)
        if variances is not None:
            squares += np.moveaxis(variances.astype(np.float64), 1, 0).reshape(latents.shape[1], -1).sum(axis=1)
        count = rows.shape[1]
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self._mean
        self._squares += squares + np.square(delta) * (self.count * count / total)
        self._mean += delta * (count / total)
        self.count = total

    def mean(self) -> np.ndarray:
        """Return the mean of each channel."""
        assert self._mean is not None
        return self._mean.copy()

    def deviation(self) -> np.ndarray:
        """Return the standard deviation of each channel."""
        assert self._squares is not None
        return np.sqrt(self._squares / self.count)

    def total_deviation(self) -> float:
        """Return the standard deviation of all values around their common mean."""
        mean, variance = self.mean(), np.square(self.deviation())
        return float(np.sqrt(variance.mean() + mean.var()))
