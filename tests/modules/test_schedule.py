"""Tests of noise schedules against closed forms and recorded values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity_replay import assert_replayed

from ldm.errors import UserError
from ldm.modules.diffusionmodules import schedule as s

# Step counts for which the published grid has exactly S timesteps, all in range.
VALID_PUBLISHED_STEPS = [S for S in range(1, 1000) if 1000 % S == 0]


@pytest.mark.parametrize("name", s.BETA_SCHEDULES)
def test_betas_match_the_recorded_values(name):
    assert_replayed("schedules", f"betas_{name}")


def test_linear_schedule_is_linear_in_the_square_root():
    roots = np.sqrt(s.make_beta_schedule("linear", 100, 0.01, 0.04))
    assert np.allclose(np.diff(roots), (0.2 - 0.1) / 99)


def test_unknown_schedule_raises_user_error_with_a_suggestion():
    with pytest.raises(UserError, match='"linaer" is not known \\(did you mean "linear"'):
        s.make_beta_schedule("linaer", 10)


@pytest.mark.parametrize("method", ["uniform", "quad"])
@pytest.mark.parametrize("S", [5, 7, 50, 200])
def test_published_grids_match_the_recorded_values(method, S):
    assert_replayed("schedules", f"ddim_timesteps_{method}_{S}")


@pytest.mark.parametrize("T", [1000, 20, 7])
def test_exact_grid_has_every_number_of_steps(T):
    for S in range(1, T + 1):
        steps = s.make_ddim_timesteps("exact", S, T)
        assert len(steps) == S
        assert steps[0] >= 0
        assert steps[-1] < T
        assert (np.diff(steps) > 0).all()


def test_exact_grid_equals_the_published_grid_if_s_divides_t():
    assert len(VALID_PUBLISHED_STEPS) == 15
    for S in VALID_PUBLISHED_STEPS:
        assert (s.make_ddim_timesteps("exact", S, 1000) == s.make_ddim_timesteps("uniform", S, 1000)).all()


@pytest.mark.parametrize("S", [27, 300, 1000])
def test_published_grid_outside_the_range_raises_user_error(S):
    with pytest.raises(UserError, match="past the last one"):
        s.make_ddim_timesteps("uniform", S, 1000)


@pytest.mark.parametrize("S", [0, -3, 1001])
def test_invalid_step_count_raises_user_error(S):
    with pytest.raises(UserError, match="choose between 1 and the model's 1000"):
        s.make_ddim_timesteps("exact", S, 1000)


@pytest.mark.parametrize("T", [1000, 20, 7])
def test_logsnr_grid_has_every_number_of_steps(T):
    alphas_cumprod = s.diffusion_tables(s.make_beta_schedule("linear", T))["alphas_cumprod"]
    for S in range(1, T + 1):
        steps = s.make_ddim_timesteps("logsnr", S, T, alphas_cumprod=alphas_cumprod)
        assert len(steps) == S
        assert steps[-1] == T - 1
        assert steps[0] == 0 or S == 1
        assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize("schedule", s.BETA_SCHEDULES[:3])
def test_logsnr_grid_is_even_in_logsnr(schedule):
    alphas_cumprod = s.diffusion_tables(s.make_beta_schedule(schedule, 100_000, 1.5e-5, 1.95e-4))["alphas_cumprod"]
    half_logsnr = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
    gaps = -np.diff(half_logsnr[s.make_ddim_timesteps("logsnr", 20, 100_000, alphas_cumprod=alphas_cumprod)])
    resolution = np.abs(np.diff(half_logsnr)).max()  # largest change within one timestep
    assert np.allclose(gaps, (half_logsnr[0] - half_logsnr[-1]) / 19, atol=resolution)


def test_logsnr_grid_without_schedule_raises_value_error():
    with pytest.raises(ValueError, match="pass alphas_cumprod"):
        s.make_ddim_timesteps("logsnr", 10, 1000)


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


def zero_snr_betas(T=1000, schedule="linear"):
    return s.rescale_zero_terminal_snr(s.make_beta_schedule(schedule, T))


@pytest.mark.parametrize("schedule", s.BETA_SCHEDULES)
@pytest.mark.parametrize("T", [2, 7, 1000])
def test_rescaled_schedule_ends_at_zero_and_keeps_its_start(T, schedule):
    before = np.cumprod(1 - s.make_beta_schedule(schedule, T))
    betas = zero_snr_betas(T, schedule)
    after = np.cumprod(1 - betas)
    assert betas[-1] == 1 and after[-1] == 0
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    # The map of √ᾱ is affine.
    scale = np.sqrt(before[0]) / (np.sqrt(before[0]) - np.sqrt(before[-1]))
    assert np.allclose(np.sqrt(after), (np.sqrt(before) - np.sqrt(before[-1])) * scale, atol=1e-12)
    assert (s.rescale_zero_terminal_snr(betas) == betas).all()


def test_schedule_of_one_timestep_cannot_be_rescaled():
    with pytest.raises(UserError, match="at least 2 timesteps"):
        s.rescale_zero_terminal_snr(np.array([0.5]))


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.1, 1.1], [0.1, -0.1], [0.1, np.nan], [], [[0.1, 0.2]]])
def test_betas_out_of_range_raise_user_error(betas):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        s.check_betas(np.array(betas))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("v_posterior", [0.0, 0.3])
def test_tables_are_finite_at_zero_terminal_snr(v_posterior):
    t = s.diffusion_tables(zero_snr_betas(), v_posterior)
    assert all(np.isfinite(table).all() for table in t.values())
    # The posterior at the last timestep is q(x_{T-1} | x_0): x_T is noise alone.
    assert t["posterior_mean_coef1"][-1] == pytest.approx(np.sqrt(t["alphas_cumprod"][-2]))
    assert t["posterior_mean_coef2"][-1] == 0
    expected = (1 - v_posterior) * (1 - t["alphas_cumprod"][-2]) + v_posterior
    assert t["posterior_variance"][-1] == pytest.approx(expected)
    assert t["sqrt_recip_alphas_cumprod"][-1] == t["sqrt_recipm1_alphas_cumprod"][-1] == 0
    assert np.allclose(t["sqrt_recip_alphas_cumprod"][:-1] ** 2 * t["alphas_cumprod"][:-1], 1)


@pytest.mark.filterwarnings("error")
def test_loss_weights_are_finite_at_zero_terminal_snr():
    t = s.diffusion_tables(s.rescale_zero_terminal_snr(s.make_beta_schedule("linear", 50, 0.01, 0.1)))
    alphas = t["alphas_cumprod"]
    x_start_weights = t["posterior_mean_coef1"][1:] ** 2 / (2 * t["posterior_variance"][1:])
    weights = s.lvlb_weights(t, "v")
    assert np.allclose(weights[1:], x_start_weights * (1 - alphas)[1:], rtol=1e-4)
    assert 0 < weights[-1] < np.inf
    assert np.isfinite(s.lvlb_weights(t, "x0")).all()
    for parameterization in ("x0", "v"):
        weights = s.min_snr_weights(alphas, 5.0, parameterization)
        assert np.isfinite(weights).all() and weights[-1] == 0


@pytest.mark.parametrize("T", [1000, 20, 7])
def test_trailing_grid_has_every_number_of_steps_and_ends_at_the_last_timestep(T):
    for S in range(1, T + 1):
        steps = s.make_ddim_timesteps("trailing", S, T)
        assert len(steps) == S
        assert steps[0] >= 0
        assert steps[-1] == T - 1
        gaps = np.diff(steps)
        assert (gaps >= T // S).all() and (gaps <= -(-T // S)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("T", [1000, 20, 7, 2])
def test_logsnr_grid_includes_the_last_timestep_at_zero_terminal_snr(T):
    alphas_cumprod = s.diffusion_tables(zero_snr_betas(T))["alphas_cumprod"]
    for S in range(1, T + 1):
        steps = s.make_ddim_timesteps("logsnr", S, T, alphas_cumprod=alphas_cumprod)
        assert len(steps) == S
        assert steps[-1] == T - 1
        assert steps[0] == 0 or S == 1
        assert (np.diff(steps) > 0).all()


def test_logsnr_grid_is_even_from_the_lowest_lambda_at_zero_terminal_snr():
    betas = s.rescale_zero_terminal_snr(s.make_beta_schedule("linear", 100_000, 1.5e-5, 1.95e-4))
    alphas_cumprod = s.diffusion_tables(betas)["alphas_cumprod"]
    steps = s.make_ddim_timesteps("logsnr", 20, 100_000, alphas_cumprod=alphas_cumprod)
    half_logsnr = 0.5 * np.log(alphas_cumprod[:-1] / (1 - alphas_cumprod[:-1]))
    expected = np.linspace(half_logsnr[0], s.LOWEST_LAMBDA, 20)[:-1]
    assert steps[-1] == 99_999
    resolution = np.abs(np.diff(half_logsnr[half_logsnr > s.LOWEST_LAMBDA])).max()
    assert np.allclose(half_logsnr[steps[:-1]], expected, atol=resolution)


def test_weights_of_the_variational_bound():
    """Check equation 12 of arXiv:2006.11239: |μ̃(x_t, x_0) - μ̃(x_t, x̂_0)|² / 2σ² for a prediction error of 1."""
    t = s.diffusion_tables(s.make_beta_schedule("linear", 50, 0.01, 0.1))
    alphas = t["alphas_cumprod"]
    x_start_weights = t["posterior_mean_coef1"][1:] ** 2 / (2 * t["posterior_variance"][1:])
    assert np.allclose(s.lvlb_weights(t, "eps")[1:], x_start_weights * ((1 - alphas) / alphas)[1:], rtol=1e-4)
    assert np.allclose(s.lvlb_weights(t, "v")[1:], x_start_weights * (1 - alphas)[1:], rtol=1e-4)


def test_min_snr_weights():
    alphas = np.array([0.9, 0.5, 0.1])  # signal-to-noise ratios of 9, 1 and 1/9
    assert np.allclose(s.min_snr_weights(alphas, 5.0, "x0"), [5, 1, 1 / 9])
    assert np.allclose(s.min_snr_weights(alphas, 5.0, "eps"), [5 / 9, 1, 1])
    assert np.allclose(s.min_snr_weights(alphas, 5.0, "v"), [5 / 10, 1 / 2, 1 / 10])
    with pytest.raises(UserError, match="min_snr_gamma must be above 0, got 0"):
        s.min_snr_weights(alphas, 0, "eps")


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


def test_ddim_with_eta_one_on_all_timesteps_is_the_ddpm_posterior():
    tables = s.diffusion_tables(s.make_beta_schedule("linear", 100, 0.001, 0.1))
    sigmas, _, alphas_prev = s.make_ddim_sampling_parameters(tables["alphas_cumprod"], np.arange(100), 1.0)
    assert np.allclose(sigmas**2, tables["posterior_variance"])
    assert alphas_prev[0] == 1.0


def test_trailing_grid_ends_at_the_data():
    tables = s.diffusion_tables(zero_snr_betas())
    steps = s.make_ddim_timesteps("trailing", 10, 1000)
    sigmas, alphas, alphas_prev = s.make_ddim_sampling_parameters(
        tables["alphas_cumprod"], steps, 1.0, ends_at_data=True
    )
    assert alphas_prev[0] == 1 and sigmas[0] == 0
    assert alphas[-1] == 0 and sigmas[-1] == pytest.approx(np.sqrt(1 - alphas_prev[-1]))


def test_step_between_two_timesteps_of_noise_adds_no_noise():
    sigmas, *_ = s.make_ddim_sampling_parameters(np.array([0.9, 0.5, 0.0, 0.0]), np.arange(4), 1.0)
    assert np.isfinite(sigmas).all() and sigmas[3] == 0 and sigmas[2] == pytest.approx(np.sqrt(0.5))


def test_repeated_noise_is_equal_for_all_items():
    noise = s.noise_like((3, 2, 4, 4), "cpu", repeat=True)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(s.noise_like((2, 1, 2, 2), "cpu")[0], s.noise_like((2, 1, 2, 2), "cpu")[1])
