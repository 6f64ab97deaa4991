"""Tests of models and samplers with a schedule that ends at ᾱ = 0 (zero terminal SNR, arXiv:2305.08891)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import Gaussian
from parity_cases import assert_close, relative_error
from tiny_models import make_model, pixel_config, superresolution_config, unconditional_config

from ldm.errors import UserError
from ldm.io.checkpoint.loading import load_weights
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import SamplingOptions
from ldm.modules.tiles import TiledDenoiser
from ldm.pipelines.sampling import sample_latents

SHAPE = (1, 3, 3)
X_T = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, *SHAPE)
ZERO_SNR = {"rescale_betas_zero_snr": True, "parameterization": "v"}


def gaussian(parameterization="v", **options):
    return Gaussian(parameterization=parameterization, zero_snr=True, **options)


def sample(sampler, S, spacing="trailing", model=None, **options):
    model = gaussian() if model is None else model
    options = {"x_T": X_T, "ddim_discretize": spacing, "verbose": False, **options}
    return sampler(model).sample(S, 1, SHAPE, **options)[0]


# -- samplers on a Gaussian target -----------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize(
    ("sampler", "S", "spacing", "tol"),
    [
        (DDIMSampler, 500, "trailing", 2e-2),
        (DDIMSampler, 1000, "exact", 1e-2),
        (PLMSSampler, 100, "trailing", 3e-2),
        (PLMSSampler, 1000, "exact", 3e-3),
        (DPMSolverSampler, 20, "logsnr", 3e-3),
        (DPMSolverSampler, 1000, "exact", 5e-3),
        (DPMSolverSampler, 500, "trailing", 1e-2),
    ],
)
def test_deterministic_samplers_follow_probability_flow(sampler, S, spacing, tol, parameterization):
    """The flow from pure noise keeps the quantile of x_T; the samplers start at ᾱ = 0 itself."""
    model = gaussian(parameterization)
    samples = sample(sampler, S, spacing, model)
    assert model.calls[0] == 999
    assert_close(samples, model.flow(X_T, 0.0), tol)


@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
@pytest.mark.parametrize("S", [1, 2, 3, 20])
def test_both_parameterizations_give_the_same_finite_trajectory(sampler, spacing, S):
    by_v, by_x0 = (sample(sampler, S, spacing, gaussian(p)) for p in ("v", "x0"))
    assert by_v.isfinite().all()
    assert_close(by_x0, by_v, 1e-9)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_single_step_returns_the_mean_of_the_data(sampler):
    """From noise alone, the best estimate of the image is the mean, and one step ends there."""
    model = gaussian()
    assert_close(sample(sampler, 1, model=model), torch.full_like(X_T, model.mean), 1e-9)
    assert model.calls == [999]


def test_plms_starts_with_the_trapezoidal_rule():
    """The error of its first step is of third order in √ᾱ / √(1 - ᾱ), that of a DDIM step of second."""
    model = gaussian(timesteps=10_000, fineness=10)
    errors = {}
    for sampler in (DDIMSampler, PLMSSampler):
        errors[sampler] = []
        for S in (25, 50, 100):
            steps = sampler(model).sample(
                S, 1, SHAPE, x_T=X_T, ddim_discretize="trailing", log_every_t=1, verbose=False
            )[1]["x_inter"]
            end = model.alphas_cumprod[10_000 - 10_000 // S - 1]
            errors[sampler].append(float((steps[1] - model.flow(X_T, 0.0, end)).norm()))
    for sampler, factor in ((DDIMSampler, 3.5), (PLMSSampler, 7)):
        assert all(coarse / fine > factor for coarse, fine in pairwise(errors[sampler]))


def moments(sampler, S, **options):
    """Return the exact mean and standard deviation of samples; see `sample_moments` in `test_samplers.py`."""
    noise = torch.eye(S + 2, dtype=torch.float64)[:, 1:, None, None, None]
    options |= {"normals_sequence": list(noise[:, 1:].movedim(1, 0)), "verbose": False}
    x_T, T = noise[:, 0], np.arange(S)
    if isinstance(sampler, AncestralSampler):
        ends = sampler.run(x_T.shape, T, None, SamplingOptions(**options), x_T)[0].flatten()
    else:
        ends = sampler.sample(S, len(x_T), x_T.shape[1:], x_T=x_T, **options)[0].flatten()
    return ends[0].item(), (ends[1:] - ends[0]).norm().item()


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize(("sampler", "options"), [(AncestralSampler, {}), (DDIMSampler, {"eta": 1.0})])
def test_stochastic_samplers_reach_the_distribution_of_the_data(sampler, options, parameterization):
    """The start noise has exactly the distribution of x_T, so the mean is exact."""
    model = gaussian(parameterization)
    mean, std = moments(sampler(model), 1000, **options)
    assert mean == pytest.approx(model.mean, abs=1e-9)
    assert std == pytest.approx(model.std, abs=9e-3)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_strength_one_starts_from_noise_alone(sampler):
    """Of the image to start from, nothing is left."""
    noise = torch.randn(1, *SHAPE, dtype=torch.float64)
    samples = [
        sample(sampler, 10, x_T=None, x0=torch.full((1, *SHAPE), x0), strength=1.0, noise_sampler=lambda shape: noise)
        for x0 in (-1.0, 1.0)
    ]
    assert torch.equal(*samples)
    assert_close(samples[0], sample(sampler, 10, x_T=noise), 1e-12)


@pytest.mark.parametrize(("sampler", "tol"), [(DDIMSampler, 2e-2), (PLMSSampler, 6e-3), (DPMSolverSampler, 1e-2)])
def test_partial_run_on_the_trailing_grid_follows_probability_flow(sampler, tol):
    model = gaussian()
    samples = sample(sampler, 500, model=model, strength=0.7)
    assert model.calls[0] == 699
    assert_close(samples, model.flow(X_T, model.alphas_cumprod[699]), tol)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_guidance_samples_the_extrapolated_mean(sampler):
    c, uc = torch.full((1, 1), 1.0), torch.full((1, 1), 0.5)
    guided = sample(sampler, 10, conditioning=c, unconditional_guidance_scale=3.0, unconditional_conditioning=uc)
    assert_close(guided, sample(sampler, 10, conditioning=torch.full((1, 1), 2.0)), 1e-6)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_several_timesteps_of_noise_change_nothing(sampler):
    """In float32, ᾱ of the last timesteps of a long schedule underflows to 0."""
    model = gaussian(timesteps=100)
    longer = gaussian(timesteps=100)
    longer.num_timesteps, longer.alphas_cumprod = 102, torch.cat([longer.alphas_cumprod, torch.zeros(2)])
    expected, samples = sample(sampler, 100, model=model), sample(sampler, 102, model=longer)
    tol = 1e-3 if sampler is PLMSSampler else 1e-12  # the history of PLMS is longer by two equal predictions
    assert relative_error(samples, expected) < tol


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_noise_prediction_at_zero_snr_raises_user_error(sampler):
    with pytest.raises(UserError, match=r'zero terminal SNR.*use parameterization "v" or "x0"'):
        sample(sampler, 10, model=gaussian("eps"))
    assert sample(sampler, 10, "exact", gaussian("eps")).isfinite().all(), "this grid ends before ᾱ = 0"


def test_ancestral_noise_prediction_at_zero_snr_raises_user_error():
    sampler, options = AncestralSampler(gaussian("eps", timesteps=20)), SamplingOptions(verbose=False)
    with pytest.raises(UserError, match="zero terminal SNR"):
        sampler.run((1, *SHAPE), np.arange(20), None, options, X_T)


# -- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm", "ddpm"])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_model_samples_finite_latents(sampler, steps, parameterization, caplog):
    model = make_model(unconditional_config(**{**ZERO_SNR, "parameterization": parameterization}))
    latents = sample_latents(model, (2, 3, 8, 8), sampler=sampler, steps=steps)
    assert latents.isfinite().all() and not caplog.text


def test_given_betas_can_end_at_zero_snr():
    betas = [0.1, 0.5, 1.0]
    model = make_model(pixel_config(given_betas=betas, parameterization="x0"))
    assert model.alphas_cumprod[-1] == 0
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert sample_latents(model, (1, 3, 8, 8), sampler="dpm", steps=3).isfinite().all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rescale_betas_zero_snr": True}, r'parameterization "eps" predicts no image; use parameterization "v"'),
        ({"given_betas": [0.1, 1.0]}, r'parameterization "eps" predicts no image; use parameterization "v"'),
        ({"given_betas": [0.1, 1.5]}, "above 0 and at most 1"),
        ({"timestep_spacing": "trailling"}, 'timestep_spacing "trailling" is not known .did you mean "trailing"'),
    ],
)
def test_invalid_schedules_raise_user_error(params, message):
    with pytest.raises(UserError, match=message):
        make_model(pixel_config(**params))


def test_noise_at_zero_snr_predicts_zero():
    """The noise determines no x_0 there; the value must be finite all the same."""
    model = make_model(pixel_config(**ZERO_SNR))
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([99, 50])
    x_start = model.predict_start_from_noise(x_t, t, torch.zeros_like(x_t))
    assert torch.equal(x_start[0], torch.zeros(3, 8, 8))
    assert_close(x_start[1], x_t[1] / model.sqrt_alphas_cumprod[50], 1e-6)


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize("options", [{}, {"original_elbo_weight": 0.1}, {"min_snr_gamma": 5.0}, {"v_posterior": 0.3}])
def test_losses_and_gradients_are_finite_at_zero_snr(parameterization, options):
    config = pixel_config(**{**ZERO_SNR, "parameterization": parameterization, "learn_logvar": True, **options})
    model = make_model(config).train().requires_grad_(True)
    x_start, noise = torch.randn(2, 2, 3, 8, 8)
    loss, log = model.p_losses(x_start, torch.tensor([99, 99]), noise)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in log.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(model.q_sample(x_start, torch.tensor([99, 99]), noise), noise)
    output = model.apply_model(noise, torch.tensor([99, 99]))
    target = x_start if parameterization == "x0" else -x_start
    assert log["train/loss_simple"].item() == pytest.approx(((output - target) ** 2).mean().item(), rel=1e-5)


def test_checkpoint_does_not_replace_a_rescaled_schedule():
    """A checkpoint of the usual schedule is fine-tuned to zero terminal SNR; its tables are of the other schedule."""
    config = pixel_config(parameterization="v")
    trained, tuned = make_model(config), make_model(pixel_config(**ZERO_SNR))
    expected = tuned.alphas_cumprod.clone()
    report = load_weights(tuned, trained.state_dict())
    assert not report.missing and not report.unexpected
    assert torch.equal(tuned.alphas_cumprod, expected) and expected[-1] == 0
    assert torch.equal(next(tuned.model.parameters()), next(trained.model.parameters()))
    load_weights(trained, tuned.state_dict())
    assert torch.equal(trained.alphas_cumprod, expected), "without the option, the tables of the checkpoint are used"


# -- grid of timesteps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_model_sets_the_default_grid(sampler):
    configs = [superresolution_config(**ZERO_SNR), superresolution_config(**ZERO_SNR, timestep_spacing="trailing")]
    plain, trailing = (make_model(config) for config in configs)
    x_T, cond = torch.randn(2, 1, 3, 8, 8)

    def run(model, spacing=None):
        options = {"sampler": sampler, "steps": 5, "x_T": x_T, "cond": cond, "timestep_spacing": spacing}
        return sample_latents(model, x_T.shape, **options)

    expected = run(plain, "trailing")
    assert torch.equal(run(trailing), expected)
    assert_close(run(TiledDenoiser(trailing, 8, 2)), expected, 1e-5)
    assert relative_error(run(plain), expected) > 1e-2
    assert torch.equal(run(trailing, "logsnr" if sampler == "dpm" else "exact"), run(plain))
