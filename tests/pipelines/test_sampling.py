"""Tests of `ldm.pipelines.sampling`: samplers, progress, precision, tiles and decoding."""

from __future__ import annotations

import pytest
import torch
from parity_cases import assert_close
from text_images import sample_text
from tiny_models import write_model

from ldm.errors import UserError
from ldm.models.diffusion.noise import SeededNoise
from ldm.modules.tiles import TiledDenoiser
from ldm.pipelines.loading import load_model
from ldm.pipelines.sampling import decode, sample_latents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


@pytest.fixture
def model(folder):
    return load_model(folder / "config.yaml", folder / "model.ckpt")


# -- samplers --------------------------------------------------------------------------------------------------


def test_each_name_selects_another_sampler(model):
    noise = torch.randn(1, 3, 8, 8)
    ddim, plms, dpm, ddpm = (
        sample_text(model, ["fox"], sampler=name, steps=8, x_T=noise) for name in ("ddim", "plms", "dpm", "ddpm")
    )
    assert not torch.equal(ddim, plms) and not torch.equal(ddim, dpm) and not torch.equal(plms, dpm)
    assert not any(torch.equal(ddpm, other) for other in (ddim, plms, dpm))
    with pytest.raises(UserError, match=r'no sampler "dmp" \(did you mean "dpm"\?\); choose ddim, plms, dpm'):
        sample_text(model, ["fox"], sampler="dmp")


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 5), ("plms", 5), ("dpm", 5), ("ddpm", 100)])
def test_on_step_is_called_after_every_step(model, sampler, steps):
    calls = []
    sample_text(model, ["a"], sampler=sampler, steps=5, on_step=lambda: calls.append(1))
    assert len(calls) == steps


def test_bfloat16_samples_nearly_the_same_images(folder, model):
    half = load_model(folder / "config.yaml", folder / "model.ckpt", "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.alphas_cumprod.dtype == torch.float32
    noise = torch.randn(2, 3, 8, 8)
    images = [sample_text(each, ["a", "b"], steps=4, scale=2.0, x_T=noise) for each in (half, model)]
    assert images[0].dtype == torch.float32
    assert_close(*images, tol=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_decoded_values_that_are_not_finite_are_nan(model, monkeypatch, value):
    """Clamped infinite values would look like white or black pixels."""
    factors = torch.tensor([3.0, value]).view(2, 1, 1, 1)
    monkeypatch.setattr(model, "decode_first_stage", lambda z: factors.expand(2, 3, 2 * z.shape[2], 2 * z.shape[3]))
    for tile in (None, 4):
        images = decode(model, torch.ones(2, 3, 8, 8), tile)
        assert torch.allclose(images[0], torch.ones(3, 16, 16)) and images[1].isnan().all()


# -- tiles -----------------------------------------------------------------------------------------------------


class PointwiseDenoiser:
    """Model of x_start that looks at single positions: tiles of a large map give the result of the whole map."""

    num_timesteps, parameterization, device = 100, "x0", torch.device("cpu")
    alphas_cumprod = torch.linspace(0.99, 0.01, 100)

    def __init__(self) -> None:
        self.model, self.calls = torch.nn.Identity(), 0

    def apply_model(self, x, t, cond):
        self.calls += 1
        return torch.tanh(x * 0.3 + cond)

    def q_posterior(self, x_start, x_t, t):
        """Return mean, variance and log variance of q(x_{t-1} | x_t, x_start)."""
        ratio = (t / self.num_timesteps).view(-1, 1, 1, 1)
        variance = torch.full_like(ratio, 0.01)
        return ratio * x_t + (1 - ratio) * x_start, variance, variance.log()


class TileMeans(PointwiseDenoiser):
    """Model whose tiles disagree: each predicts the mean of its conditioning."""

    def apply_model(self, x, t, cond):
        self.calls += 1
        return cond.mean(dim=(2, 3), keepdim=True).expand_as(x)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm", "ddpm"])
def test_tiles_of_a_pointwise_model_have_no_seam(sampler):
    cond, start = torch.randn(2, 3, 20, 28), torch.randn(2, 3, 20, 28)
    options = {"sampler": sampler, "steps": 5, "eta": float(sampler == "ddim"), "cond": cond, "x_T": start}
    results = []
    for model in (whole := PointwiseDenoiser(), TiledDenoiser(parts := PointwiseDenoiser(), 8, 2)):
        torch.manual_seed(0)
        results.append(sample_latents(model, start.shape, **options))
    assert parts.calls == 15 * whole.calls
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_ancestral_sampler_evaluates_every_timestep_in_tiles():
    """Tiles that disagree change its result: it must not call the network of the wrapped model itself."""
    cond = torch.linspace(-1, 1, 28).expand(1, 3, 20, 28)
    options = {"sampler": "ddpm", "cond": cond, "x_T": torch.zeros(1, 3, 20, 28)}
    whole = sample_latents(TileMeans(), cond.shape, **options, noise=SeededNoise([1]))
    tiled = sample_latents(TiledDenoiser(parts := TileMeans(), 8, 2), cond.shape, **options, noise=SeededNoise([1]))
    assert parts.calls == 15 * parts.num_timesteps
    assert (whole - tiled).abs().max() > 0.5
    left, right = tiled[..., :4].mean(), tiled[..., -4:].mean()
    assert right - left > 1, "each tile follows the mean of its own conditioning"
    assert (whole[..., :4].mean() - whole[..., -4:].mean()).abs() < 0.1, "the whole map has one mean"


def test_tiles_that_disagree_blend_without_a_seam():
    """Every tile of a ramp has its own mean; neighbouring results differ at most by the steps of the blend."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 8, 64)
    model = TiledDenoiser(TileMeans(), 16, 8)
    result = sample_latents(model, ramp.shape, steps=10, cond=ramp, x_T=torch.zeros_like(ramp))
    row = result[0, 0, 4]
    difference = 8 * 2 / 63  # of the means of neighbouring tiles, which a seam would show
    assert (row.diff() >= -1e-6).all() and row.diff().max() < 2.01 * difference / 9


# -- decoding --------------------------------------------------------------------------------------------------


def test_decoding_falls_back_to_single_images_and_tiles(model, monkeypatch, caplog):
    """With little memory the result is nearly the same, and the log describes the fallback."""
    latents = torch.randn(2, 3, 24, 40)
    whole = decode(model, latents)
    decode_first_stage = model.decode_first_stage
    sizes = []

    def little_memory(z):
        sizes.append(tuple(z.shape))
        if z.numel() > 3 * 16 * 16:
            raise RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 1 bytes")
        return decode_first_stage(z)

    monkeypatch.setattr(model, "decode_first_stage", little_memory)
    tiled = decode(model, latents)
    assert sizes[:3] == [(2, 3, 24, 40), (1, 3, 24, 40), (1, 3, 24, 32)]
    assert "decoding tiles of 16 × 16 latents" in caplog.text
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.25 * whole.std()


def test_decoding_that_never_fits_is_one_line(model, monkeypatch):
    def no_memory(z):
        raise RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(model, "decode_first_stage", no_memory)
    with pytest.raises(UserError, match="out of memory; use smaller images"):
        decode(model, torch.randn(1, 3, 24, 40))


def test_decoding_raises_other_errors(model, monkeypatch):
    def broken(z):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(model, "decode_first_stage", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        decode(model, torch.randn(2, 3, 8, 8))
