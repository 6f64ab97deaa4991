"""Distributions over the latent of the first stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AbstractDistribution:
    """Base class of distributions with a sample and a mode."""

    def sample(self) -> Tensor:
        """Return a random sample."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """Return the most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """Distribution with all its probability on one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        """Return the value."""
        return self.value

    def mode(self) -> Tensor:
        """Return the value."""
        return self.value


class DiagonalGaussianDistribution(AbstractDistribution):
    """Gaussian with a diagonal covariance matrix.

    Args:
        parameters: (B, 2C, H, W), the mean in the first C channels and the log-variance in the others. The
            log-variance is clamped to [-30, 20].
        deterministic: put all the probability on the mean; `sample` returns the mean, `kl` and `nll` return 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)
        else:
            self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self) -> Tensor:
        """Return a random sample (B, C, H, W).

        The noise comes from the CPU generator on every device, so a seed gives the same latent on all devices.
        """
        return self.mean + self.std * torch.randn(self.mean.shape).to(self.mean)

    def mode(self) -> Tensor:
        """Return the mean (B, C, H, W)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return the KL divergence (B,) of each image to `other`, by default to the standard normal distribution."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() + self.var
            terms = distance / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return the negative log-likelihood of `sample` (B, C, H, W), summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))


def normal_kl(mean1: Tensor, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Return the elementwise KL divergence between two Gaussians, given their means and log-variances.

    The arguments are broadcast against each other. At least one of them must be a tensor, the others may be numbers.

    Raises:
        TypeError: no argument is a tensor.
    """
    tensor = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor)), None)
    if tensor is None:
        raise TypeError("normal_kl needs at least one tensor")
    mean1, logvar1, mean2, logvar2 = (torch.as_tensor(x).to(tensor) for x in (mean1, logvar1, mean2, logvar2))
    distance = (mean1 - mean2).square() * torch.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + distance)
