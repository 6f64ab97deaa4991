"""The distributions that the first stage puts on its latent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AbstractDistribution:
    """Something to draw from, with a most likely value."""

    def sample(self) -> Tensor:
        """A random draw."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """The most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """All the mass on one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        """The value."""
        return self.value

    def mode(self) -> Tensor:
        """The value."""
        return self.value


class DiagonalGaussianDistribution(AbstractDistribution):
    """A Gaussian with independent entries.

    Args:
        parameters: (B, 2C, H, W), the mean above the logarithm of the variance; the latter is clamped to [-30, 20].
        deterministic: put all the mass on the mean; `sample` gives the mean, `kl` and `nll` give 0.
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
        """A draw, (B, C, H, W).

        The noise comes from the CPU generator on every device, so that a seed means the same latent everywhere.
        """
        return self.mean + self.std * torch.randn(self.mean.shape).to(self.mean)

    def mode(self) -> Tensor:
        """The mean, (B, C, H, W)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence to `other`, to the standard normal distribution by default, of each image: (B,)."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean).square() + self.var
            terms = distance / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of `sample`: (B, C, H, W), summed over `dims`."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.sum(dim=tuple(dims))


def normal_kl(mean1: Tensor, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL divergence between Gaussians given by their means and log-variances, entry by entry.

    Arguments broadcast against each other; any of them may be a number as long as one is a tensor.

    Raises:
        TypeError: none of them is a tensor.
    """
    like = next((x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor)), None)
    if like is None:
        raise TypeError("normal_kl needs at least one tensor")
    mean1, logvar1, mean2, logvar2 = (torch.as_tensor(x).to(like) for x in (mean1, logvar1, mean2, logvar2))
    distance = (mean1 - mean2).square() * torch.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + torch.exp(logvar1 - logvar2) + distance)
