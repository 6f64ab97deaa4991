"""Samplers of k-diffusion drive the models: its Euler steps are DDIM steps with eta 0.

Its `CompVisDenoiser` uses `model.alphas_cumprod` and `model.apply_model(x, t, cond)`. It works in the form x / √ᾱ
(variance exploding), with sigma = √((1 - ᾱ) / ᾱ). The tests always run with a stand-in that has the same interface.
They also run with the package itself if it is installed:

    pip install --no-deps k-diffusion scipy torchdiffeq torchsde trampoline

Its other dependencies, which measure and train, are not needed.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_models import inpainting_config, make_model, text_config, unconditional_config
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.pipelines.sampling import decode, sample_latents

STEPS = 8


class StandInDenoiser(nn.Module):
    """Minimal version of `k_diffusion.external.CompVisDenoiser`: x and sigma to the estimate of the clean sample."""

    def __init__(self, model, quantize: bool = False) -> None:
        super().__init__()
        self.inner_model, self.quantize = model, quantize
        self.sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod) ** 0.5

    def sigma_to_t(self, sigma):
        distances = sigma.log() - self.sigmas.log()[:, None]
        if self.quantize:
            return distances.abs().argmin(dim=0)
        low = distances.ge(0).cumsum(dim=0).argmax(dim=0).clamp(max=len(self.sigmas) - 2)
        below, above = self.sigmas.log()[low], self.sigmas.log()[low + 1]
        return low + ((below - sigma.log()) / (below - above)).clamp(0, 1)

    def forward(self, x, sigma, **extra_args):
        scaled = x / (sigma.view(-1, 1, 1, 1) ** 2 + 1) ** 0.5
        eps = self.inner_model.apply_model(scaled, self.sigma_to_t(sigma), **extra_args)
        return x - sigma.view(-1, 1, 1, 1) * eps


def sample_euler(model, x, sigmas, extra_args=None, disable=None):
    """Minimal version of `k_diffusion.sampling.sample_euler` without churn."""
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


class GuidedDenoiser(nn.Module):
    """Classifier-free guidance for denoisers of k-diffusion."""

    def __init__(self, denoiser, cond, uncond, scale: float) -> None:
        super().__init__()
        self.denoiser, self.cond, self.uncond, self.scale = denoiser, cond, uncond, scale

    def forward(self, x, sigma):
        cond, uncond = (self.denoiser(x, sigma, cond=each) for each in (self.cond, self.uncond))
        return uncond + self.scale * (cond - uncond)


@pytest.fixture(params=["k-diffusion", "stand-in"])
def library(request, monkeypatch):
    """Return `CompVisDenoiser` and `sample_euler` of the package, or their stand-ins."""
    if request.param == "stand-in":
        return SimpleNamespace(CompVisDenoiser=StandInDenoiser, sample_euler=sample_euler)
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    # The package imports all of its modules, which need its metrics; two of them need only torch and its solvers.
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    external = import_module("k_diffusion.external")
    return SimpleNamespace(
        CompVisDenoiser=external.CompVisDenoiser, sample_euler=import_module("k_diffusion.sampling").sample_euler
    )


def euler_latents(library, model, x_T, denoise, **extra_args):
    """Return the latents of Euler steps on the grid of DDIM, which ends at the first timestep of the model."""
    grid = DDIMSampler(model)
    grid.make_schedule(STEPS, verbose=False)
    alphas = torch.cat([model.alphas_cumprod[:1], model.alphas_cumprod[torch.from_numpy(grid.ddim_timesteps).long()]])
    sigmas = ((1 - alphas) / alphas).sqrt().flip(0)
    with torch.no_grad():
        x = library.sample_euler(denoise, x_T / alphas[-1].sqrt(), sigmas, extra_args=extra_args, disable=True)
    return x * alphas[0].sqrt()


def assert_same_images(model, latents, expected) -> None:
    images, expected = decode(model, latents), decode(model, expected)
    assert expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)


def conditioning(model, kind: str):
    torch.manual_seed(0)
    if kind == "text":
        return model.get_learned_conditioning(["rocket", "fox"])
    return None if kind == "unconditional" else torch.randn(2, 4, 8, 8)


CONFIGS = {"text": text_config(), "unconditional": unconditional_config(), "in-painting": inpainting_config()}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_euler_steps_equal_ddim_steps(library, kind, quantize):
    model = make_model(CONFIGS[kind])
    assert model.parameterization == "eps"
    cond, x_T = conditioning(model, kind), torch.randn(2, 3, 8, 8)
    expected = sample_latents(model, x_T.shape, sampler="ddim", steps=STEPS, eta=0.0, cond=cond, x_T=x_T)
    denoiser = library.CompVisDenoiser(model, quantize=quantize)
    latents = euler_latents(library, model, x_T, denoiser, cond=cond)
    assert_same_images(model, latents, expected)


def test_guided_euler_steps_equal_guided_ddim_steps(library):
    model = make_model(CONFIGS["text"])
    cond, x_T = conditioning(model, "text"), torch.randn(2, 3, 8, 8)
    uncond = model.get_learned_conditioning(["", ""])
    options = {"sampler": "ddim", "steps": STEPS, "eta": 0.0, "cond": cond, "x_T": x_T}
    expected = sample_latents(model, x_T.shape, scale=3.0, uncond=uncond, **options)
    guided = GuidedDenoiser(library.CompVisDenoiser(model, quantize=True), cond, uncond, 3.0)
    assert_same_images(model, euler_latents(library, model, x_T, guided), expected)
    assert (expected - sample_latents(model, x_T.shape, **options)).abs().max() > 1e-2, "guidance has an effect"
