"""Tests of the Gaussian posterior against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import (
    AbstractDistribution,
    DiagonalGaussianDistribution,
    DiracDistribution,
    normal_kl,
)

SUM = (1, 2, 3)


def random_parameters(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(seed))


def as_normal(posterior: DiagonalGaussianDistribution) -> Normal:
    return Normal(posterior.mean, posterior.std)


def test_parameters_are_mean_and_log_variance():
    parameters = random_parameters(0)
    posterior = DiagonalGaussianDistribution(parameters)
    torch.testing.assert_close(posterior.mean, parameters[:, :3])
    torch.testing.assert_close(posterior.var, parameters[:, 3:].exp())
    torch.testing.assert_close(posterior.std.square(), posterior.var)
    torch.testing.assert_close(posterior.mode(), parameters[:, :3])


def test_log_variance_is_clamped():
    posterior = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -99.0, 99.0]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_kl_matches_torch_distributions():
    posterior = DiagonalGaussianDistribution(random_parameters(1))
    other = DiagonalGaussianDistribution(random_parameters(2))
    standard = Normal(torch.tensor(0.0), torch.tensor(1.0))
    torch.testing.assert_close(posterior.kl(), kl_divergence(as_normal(posterior), standard).sum(SUM))
    torch.testing.assert_close(posterior.kl(other), kl_divergence(as_normal(posterior), as_normal(other)).sum(SUM))


def test_kl_of_the_standard_normal_is_zero():
    assert DiagonalGaussianDistribution(torch.zeros(2, 4, 3, 3)).kl().tolist() == [0.0, 0.0]


def test_nll_matches_torch_distributions():
    posterior = DiagonalGaussianDistribution(random_parameters(3))
    sample = torch.randn_like(posterior.mean)
    log_prob = as_normal(posterior).log_prob(sample)
    torch.testing.assert_close(posterior.nll(sample), -log_prob.sum(SUM))
    torch.testing.assert_close(posterior.nll(sample, dims=[1]), -log_prob.sum(1))


def test_sample_is_one_randn_of_the_cpu_generator():
    posterior = DiagonalGaussianDistribution(random_parameters(4))
    torch.manual_seed(11)
    sample = posterior.sample()
    torch.manual_seed(11)
    torch.testing.assert_close(sample, posterior.mean + posterior.std * torch.randn(2, 3, 4, 5), rtol=0, atol=0)


def test_sample_preserves_the_dtype_and_gradients():
    parameters = random_parameters(5).to(torch.bfloat16).requires_grad_()
    sample = DiagonalGaussianDistribution(parameters).sample()
    sample.sum().backward()
    assert sample.dtype is torch.bfloat16
    assert (parameters.grad[:, :3] == 1).all()
    assert parameters.grad[:, 3:].abs().sum() > 0


def test_deterministic_distribution_returns_the_mean():
    posterior = DiagonalGaussianDistribution(random_parameters(6), deterministic=True)
    torch.testing.assert_close(posterior.sample(), posterior.mean)
    assert posterior.std.abs().sum() == 0
    assert posterior.kl().tolist() == [0.0, 0.0]
    assert posterior.nll(posterior.mean).tolist() == [0.0, 0.0]


def test_dirac_distribution_returns_its_value():
    value = torch.arange(3.0)
    assert DiracDistribution(value).sample() is value
    assert DiracDistribution(value).mode() is value


def test_abstract_distribution_raises_not_implemented_error():
    with pytest.raises(NotImplementedError):
        AbstractDistribution().sample()
    with pytest.raises(NotImplementedError):
        AbstractDistribution().mode()


def test_normal_kl_matches_torch_distributions():
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 7, generator=torch.Generator().manual_seed(7))
    expected = kl_divergence(Normal(mean1, (0.5 * logvar1).exp()), Normal(mean2, (0.5 * logvar2).exp()))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), expected)
    standard = kl_divergence(Normal(mean1, (0.5 * logvar1).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(normal_kl(mean1, logvar1, 0.0, 0.0), standard)


def test_normal_kl_without_tensors_raises_type_error():
    with pytest.raises(TypeError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)
