"""Noise schedules against closed forms and recorded numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_replay import assert_replayed

from ldm.modules.diffusionmodules import schedule as s
from ldm.util import UserError

# The step counts for which the published grid had exactly S steps, all in range.
PUBLISHED_WORKED = [S for S in range(1, 1000) if 1000 % S == 0]


@pytest.mark.parametrize("name", s.BETA_SCHEDULES)
def test_betas_are_the_recorded_ones(name):
    assert_replayed("schedules", f"betas_{name}")


def test_linear_is_linear_in_the_square_root():
    roots = np.sqrt(s.make_beta_schedule("linear", 100, 0.01, 0.04))
    assert np.allclose(np.diff(roots), (0.2 - 0.1) / 99)


def test_an_unknown_schedule_is_named_with_a_suggestion():
    with pytest.raises(UserError, match='"linaer" is not known \\(did you mean "linear"'):
        s.make_beta_schedule("linaer", 10)


@pytest.mark.parametrize("method", ["uniform", "quad"])
@pytest.mark.parametrize("S", [5, 7, 50, 200])
def test_published_grids_are_the_recorded_ones(method, S):
    assert_replayed("schedules", f"ddim_timesteps_{method}_{S}")


@pytest.mark.parametrize("T", [1000, 20, 7])
def test_every_number_of_steps_runs_exactly_so_many(T):
    for S in range(1, T + 1):
        steps = s.make_ddim_timesteps("exact", S, T)
        assert len(steps) == S
        assert steps[0] >= 0
        assert steps[-1] < T
        assert (np.diff(steps) > 0).all()


def test_the_default_grid_is_the_published_one_where_that_worked():
    assert len(PUBLISHED_WORKED) == 15
    for S in PUBLISHED_WORKED:
        assert (s.make_ddim_timesteps("exact", S, 1000) == s.make_ddim_timesteps("uniform", S, 1000)).all()


@pytest.mark.parametrize("S", [27, 300, 1000])
def test_a_published_grid_that_leaves_the_range_is_an_error(S):
    with pytest.raises(UserError, match="past the last one"):
        s.make_ddim_timesteps("uniform", S, 1000)


@pytest.mark.parametrize("S", [0, -3, 1001])
def test_step_counts_outside_the_model_are_refused(S):
    with pytest.raises(UserError, match="choose between 1 and the model's 1000"):
        s.make_ddim_timesteps("exact", S, 1000)


def test_tables_satisfy_the_definitions_of_the_process():
    betas = s.make_beta_schedule("linear", 30, 0.01, 0.2)
    t = s.diffusion_tables(betas)
    assert np.allclose(t["alphas_cumprod"], [np.prod(1 - betas[: i + 1]) for i in range(30)])
    assert np.allclose(t["sqrt_recip_alphas_cumprod"] ** 2 - t["sqrt_recipm1_alphas_cumprod"] ** 2, 1)
    # The posterior of a linear Gaussian chain by Bayes' rule: precisions add.
    precision = (1 - betas[1:]) / betas[1:] + 1 / (1 - t["alphas_cumprod_prev"][1:])
    assert np.allclose(t["posterior_variance"][1:], 1 / precision)
    assert np.allclose(t["posterior_mean_coef2"][1:], t["posterior_variance"][1:] * np.sqrt(1 - betas[1:]) / betas[1:])
    assert t["posterior_variance"][0] == 0


def test_v_posterior_interpolates_the_variance_to_beta():
    betas = s.make_beta_schedule("linear", 30)
    assert np.allclose(s.diffusion_tables(betas, 1.0)["posterior_variance"], betas)


def test_ddim_tables():
    alphas_cumprod = s.diffusion_tables(s.make_beta_schedule("linear", 1000))["alphas_cumprod"]
    steps = s.make_ddim_timesteps("exact", 10, 1000)
    sigmas, alphas, alphas_prev = s.make_ddim_sampling_parameters(alphas_cumprod, steps, 1.0)
    assert (alphas == alphas_cumprod[steps]).all()
    assert (alphas_prev[1:] == alphas[:-1]).all()
    assert alphas_prev[0] == alphas_cumprod[0]
    assert np.allclose(sigmas**2, (1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    assert not s.make_ddim_sampling_parameters(alphas_cumprod, steps, 0.0)[0].any()


def test_on_all_steps_eta_one_is_the_posterior_of_ddpm():
    tables = s.diffusion_tables(s.make_beta_schedule("linear", 100, 0.001, 0.1))
    sigmas, _, alphas_prev = s.make_ddim_sampling_parameters(tables["alphas_cumprod"], np.arange(100), 1.0)
    assert np.allclose(sigmas**2, tables["posterior_variance"])
    assert alphas_prev[0] == 1.0


def test_repeated_noise_is_the_same_for_the_batch():
    noise = s.noise_like((3, 2, 4, 4), "cpu", repeat=True)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(s.noise_like((2, 1, 2, 2), "cpu")[0], s.noise_like((2, 1, 2, 2), "cpu")[1])
