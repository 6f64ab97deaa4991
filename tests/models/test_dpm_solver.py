"""Tests of DPM-Solver++ against closed forms on a Gaussian target."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from closed_forms import Gaussian
from parity_cases import assert_close, relative_error

from ldm.errors import UserError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler

SHAPE = (1, 3, 3)
X_T = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, *SHAPE)


def sample(model, S, sampler=DPMSolverSampler, **options):
    return sampler(model).sample(S, 1, SHAPE, **{"x_T": X_T, "verbose": False, **options})[0]


@pytest.mark.parametrize(("sampler", "order"), [(DDIMSampler, 1), (DPMSolverSampler, 2)])
def test_error_decreases_with_order_of_method(sampler, order):
    """Twice the steps divide the error at timestep 0 by 2^order."""
    model = Gaussian(timesteps=100_000, fineness=100)  # fine enough for a grid that is even in λ
    exact = model.flow(X_T, model.alphas_cumprod[-1], model.alphas_cumprod[0])
    errors = []
    for S in (32, 64, 128):
        steps = sampler(model).sample(S, 1, SHAPE, x_T=X_T, ddim_discretize="logsnr", log_every_t=1, verbose=False)[1][
            "x_inter"
        ]
        errors.append(relative_error(steps[-2], exact))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_twenty_steps_follow_probability_flow(parameterization):
    model = Gaussian(parameterization=parameterization)
    exact = model.flow(X_T, model.alphas_cumprod[-1])
    assert_close(sample(model, 20), exact, 1e-3)
    assert relative_error(sample(model, 50, DDIMSampler), exact) > 2e-2


def test_many_steps_agree_with_ddim():
    model = Gaussian()
    differences = [
        relative_error(sample(model, S), sample(model, S, DDIMSampler, ddim_discretize="logsnr")) for S in (50, 1000)
    ]
    assert differences[1] < 6e-3
    assert differences[1] < differences[0] / 4


@pytest.mark.parametrize("S", [1, 2, 3, 14, 15, 20, 27, 300, 999, 1000])
def test_sampler_runs_requested_number_of_steps(S):
    model = Gaussian()
    sample(model, S)
    assert len(model.calls) == S
    assert model.calls == sorted(set(model.calls), reverse=True)
    assert model.calls[0] == 999
    assert model.calls[-1] == 0 or S == 1


@pytest.mark.parametrize(("S", "first_order"), [(2, True), (14, True), (15, False)])
def test_first_step_and_last_step_of_short_runs_are_ddim(S, first_order):
    """The grid ends before the data, where λ is finite."""
    model = Gaussian()
    steps = DPMSolverSampler(model).sample(S, 1, SHAPE, x_T=X_T, ddim_discretize="exact", log_every_t=1, verbose=False)[
        1
    ]["x_inter"]
    ddim = DDIMSampler(model)
    ddim.make_schedule(S)
    ddim.timesteps = ddim.ddim_timesteps
    assert_close(steps[1], ddim.step(X_T, S - 1, None)[0], 1e-12)
    last = relative_error(steps[-1], ddim.step(steps[-2], 0, None)[0])
    assert last < 1e-12 if first_order else last > 1e-4


def test_last_step_to_data_returns_estimate():
    result, steps = DPMSolverSampler(Gaussian()).sample(30, 1, SHAPE, x_T=X_T, verbose=False)
    assert torch.equal(result, steps["pred_x0"][-1])
    assert result.isfinite().all()


def test_guidance_samples_extrapolated_mean():
    """For Gaussian data the guided prediction is that of the mean u + s (c - u)."""
    model, c, uc = Gaussian(), torch.full((1, 1), 1.0), torch.full((1, 1), 0.5)
    guided = sample(model, 10, conditioning=c, unconditional_guidance_scale=3.0, unconditional_conditioning=uc)
    assert_close(guided, sample(model, 10, conditioning=torch.full((1, 1), 2.0)), 1e-6)


def test_mask_keeps_known_region():
    mask = torch.zeros(1, *SHAPE)
    mask[..., 0] = 1
    torch.manual_seed(0)
    x = sample(Gaussian(std=1.0), 30, mask=mask, x0=torch.full((1, *SHAPE), -1.0))
    assert (x[..., 0] + 1).abs().max() < 0.15  # noised to step 0 before the last step
    assert_close(x[..., 1:], sample(Gaussian(std=1.0), 30)[..., 1:], 1e-6)  # pixels are independent


def test_callbacks_and_intermediates():
    seen, estimates = [], []
    _, steps = DPMSolverSampler(Gaussian()).sample(
        6, 1, SHAPE, callback=seen.append, img_callback=lambda x, i: estimates.append(x), log_every_t=2, verbose=False
    )
    assert seen == list(range(6)) and len(estimates) == 6
    assert len(steps["x_inter"]) == len(steps["pred_x0"]) == 1 + 4  # the start; positions 5, 4, 2, 0
    assert torch.equal(steps["pred_x0"][-1], estimates[-1])


def test_quantize_x0_quantizes_estimates():
    model = Gaussian()
    model.first_stage_model = type("", (), {"quantize": staticmethod(lambda z: (z.round(), None, None))})
    assert set(sample(model, 20, quantize_x0=True).flatten().tolist()) <= {-1.0, 0.0, 1.0, 2.0}


def test_only_start_noise_is_sampled():
    torch.manual_seed(0)
    sample(Gaussian(), 7, x_T=None)
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.randn(1, *SHAPE)
    assert torch.equal(torch.rand(1), after)


def test_sampler_resets_between_runs():
    sampler = DPMSolverSampler(Gaussian())
    first, again = (sampler.sample(8, 1, SHAPE, x_T=X_T, verbose=False)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_nonzero_eta_raises_user_error():
    with pytest.raises(UserError, match=r"eta must be 0, got 0\.5"):
        sample(Gaussian(), 4, eta=0.5)
