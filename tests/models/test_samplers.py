"""Tests of samplers against recorded samples, and against closed forms on a Gaussian target."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import FixedEstimate, Gaussian
from parity_cases import assert_close, build, load_case
from parity_replay import PUBLISHED, SHAPE, assert_replayed

from ldm.errors import UserError
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import SamplingOptions


def model_of(name):
    case = load_case(name)
    return case, build(case)


@pytest.mark.parametrize(
    "name",
    ["ddim_unconditional_eta0", "ddim_unconditional_eta1", "ddim_quantize_x0", "ddim_masked", "ddim_given_noise"],
)
def test_ddim_matches_record(name):
    assert_replayed(name)


def test_start_noise_is_sampled_first():
    assert_replayed("ddim_unconditional_eta0", "first_noise")


def test_plms_matches_record():
    assert_replayed("plms_unconditional")


@pytest.mark.parametrize("name", ["ddim_class_guidance", "plms_class_guidance"])
def test_guidance_matches_record(name):
    assert_replayed(name)


@pytest.mark.parametrize(
    "form", [lambda c: c, lambda c: [c], lambda c: {"c_crossattn": [c]}, lambda c: {"c_crossattn": c}]
)
def test_every_form_of_conditioning_matches_record(form):
    case, model = model_of("ddim_class_guidance")
    c = model.get_learned_conditioning({"class_label": torch.tensor([2, 7])})
    uc = model.get_learned_conditioning({"class_label": torch.tensor([10, 10])})
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": form(uc)}
    torch.manual_seed(11)
    latent, _ = DDIMSampler(model).sample(5, 2, SHAPE, form(c), **guidance, **PUBLISHED)
    assert_close(latent, case.outputs["latent"])


class HybridGaussian(Gaussian):
    """Exact denoiser whose mean is the sum of the concatenated and the cross-attention conditioning."""

    def apply_model(self, x, t, cond):
        (concat,), (crossattn,) = cond["c_concat"], cond["c_crossattn"]
        return Gaussian(concat + crossattn[:, :, None], self.std).apply_model(x, t, None)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_hybrid_guidance_moves_mean(sampler):
    """The prediction is affine in the mean, so guided samples equal samples with the guided mean."""
    concat, x_T = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    text, empty = torch.full((2, 1, 1), 0.4), torch.full((2, 1, 1), -0.2)
    c, uc = ({"c_concat": [concat], "c_crossattn": [each]} for each in (text, empty))
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc}
    guided, _ = sampler(HybridGaussian()).sample(8, 2, (1, 4, 4), c, x_T=x_T, verbose=False, **guidance)
    guided_mean = Gaussian(concat + (empty + 3.0 * (text - empty))[:, :, None])
    assert_close(guided, sampler(guided_mean).sample(8, 2, (1, 4, 4), x_T=x_T, verbose=False)[0], 1e-5)


def test_ancestral_sampling_matches_record():
    assert_replayed("ddpm_ancestral")


def test_progressive_denoising_matches_record():
    assert_replayed("ddpm_progressive")


def test_inpainting_matches_record():
    assert_replayed("inpainting_pipeline")


def test_super_resolution_matches_record():
    assert_replayed("super_resolution_pipeline")


def test_semantic_synthesis_matches_record():
    assert_replayed("semantic_synthesis_pipeline")


def test_text_to_image_matches_record():
    assert_replayed("text_to_image_pipeline")


# -- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize(("sampler", "S", "tol"), [(DDIMSampler, 500, 2e-2), (PLMSSampler, 100, 2e-2)])
def test_deterministic_samplers_follow_probability_flow(sampler, S, tol, parameterization):
    model = Gaussian(parameterization=parameterization)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    sample, _ = sampler(model).sample(S, 1, (1, 3, 3), x_T=x_T, verbose=False)
    assert_close(sample, model.flow(x_T, model.alphas_cumprod[-1]), tol)


def run(sampler, S, x_T, **options):
    """Run S steps of any sampler from the noise x_T."""
    options = {"verbose": False, **options}
    if isinstance(sampler, AncestralSampler):
        return sampler.run(x_T.shape, np.arange(S), None, SamplingOptions(**options), x_T)[0]
    return sampler.sample(S, len(x_T), x_T.shape[1:], x_T=x_T, **options)[0]


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler, AncestralSampler])
def test_every_parameterization_gives_same_trajectory(sampler):
    x_T, ends = torch.randn(1, 1, 4, 4, dtype=torch.float64), []
    for parameterization in ("eps", "x0", "v"):
        torch.manual_seed(0)
        model = Gaussian(parameterization=parameterization, timesteps=50)
        ends.append(run(sampler(model), 10, x_T))
    assert_close(ends[1], ends[0], 1e-9)
    assert_close(ends[2], ends[0], 1e-9)


@pytest.mark.parametrize("sampler", [DDIMSampler, AncestralSampler])
def test_full_step_at_eta_one_matches_posterior(sampler):
    """x_{t-1} = a x_t + b x_0 + c z, for each step of the model; q(x_{t-1} | x_t, x_0) by Bayes' rule."""
    T, (x, x_start, z) = 30, torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1, 1)
    model = FixedEstimate(x_start, T)
    sampler = sampler(model)
    if isinstance(sampler, DDIMSampler):
        sampler.make_schedule(T, ddim_eta=1.0)
    sampler.timesteps, sampler.options = np.arange(T), SamplingOptions(normals_sequence=[z] * T)
    betas, alphas = (model.tables[name] for name in ("betas", "alphas_cumprod"))
    for t in range(T):
        a, b, c = sampler.step(x, t, None)[0].flatten()
        if t == 0:  # the last step
            expected = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        else:
            # Of x_{t-1}: by the likelihood q(x_t | x_{t-1}) and by the prior q(x_{t-1} | x_0).
            precisions = (1 - betas[t]) / betas[t], 1 / (1 - alphas[t - 1])
            variance = 1 / sum(precisions)
            gains = precisions[0] / (1 - betas[t]).sqrt(), precisions[1] * alphas[t - 1].sqrt()
            expected = torch.stack([variance * gains[0], variance * gains[1], variance.sqrt()])
        assert_close(torch.stack([a, b, c]), expected, 1e-9)


def sample_moments(sampler, S, **options):
    """Return the exact mean and standard deviation of the samples.

    For Gaussian data every sampler is an affine map of its noise: x_T and the noise of S steps. Item 0 of the batch
    has no noise, each other item has one of them at one.
    """
    noise = torch.eye(S + 2, dtype=torch.float64)[:, 1:, None, None, None]
    ends = run(sampler, S, noise[:, 0], normals_sequence=list(noise[:, 1:].movedim(1, 0)), **options).flatten()
    return ends[0].item(), (ends[1:] - ends[0]).norm().item()


@pytest.mark.parametrize(
    ("sampler", "S", "eta", "tol"),
    [
        (DDIMSampler, 1000, 0.0, 5e-3),
        (DDIMSampler, 1000, 1.0, 9e-3),
        (AncestralSampler, 1000, None, 9e-3),
        (PLMSSampler, 100, 0.0, 4e-3),
        (DPMSolverSampler, 20, 0.0, 1e-4),
    ],
)
def test_samples_have_distribution_of_data(sampler, S, eta, tol):
    model = Gaussian()
    mean, std = sample_moments(sampler(model), S, **({} if eta is None else {"eta": eta}))
    # N(0, 1) is not exactly the distribution of x_T. Solvers of the ODE preserve the difference.
    start = model.flow(0.0, model.alphas_cumprod[-1]) if eta == 0 else model.mean
    assert mean == pytest.approx(start, abs=tol)
    assert std == pytest.approx(model.std, abs=tol)


def test_ddim_at_eta_one_on_full_grid_matches_ancestral_sampling():
    model = Gaussian(timesteps=300)
    expected = sample_moments(AncestralSampler(model), 300)
    assert sample_moments(DDIMSampler(model), 300, eta=1.0) == pytest.approx(expected, rel=1e-9)


def chain_moments(model):
    """Return mean and standard deviation of the reverse chain, whose steps are linear and add Gaussian noise."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(model.num_timesteps)):
        c1, c2 = (float(model.tables[f"posterior_mean_coef{i}"][t]) for i in (1, 2))
        alpha = float(model.alphas_cumprod[t])
        gain = math.sqrt(alpha) * model.std**2 / (alpha * model.std**2 + 1 - alpha)
        factor = c1 * gain + c2
        mean = factor * mean + c1 * model.mean * (1 - gain * math.sqrt(alpha))
        variance = factor**2 * variance + float(model.tables["posterior_variance"][t])
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_stochastic_samplers_reach_target_distribution(method):
    model = Gaussian(timesteps=200)
    torch.manual_seed(0)
    if method == "ancestral":
        sampler = AncestralSampler(model)
        x, _ = sampler.run((64, 1, 16, 16), torch.arange(200).numpy(), None, SamplingOptions(verbose=False))
    else:
        x, _ = DDIMSampler(model).sample(200, 64, (1, 16, 16), eta=1.0, verbose=False)
    mean, std = chain_moments(model)
    # 16,384 independent pixels: the standard error is 0.0023 for the mean and 0.0017 for the standard deviation.
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.std().item() == pytest.approx(std, abs=0.007)
    assert (mean, std) == pytest.approx((0.5, 0.3), abs=0.012)  # the chain is close to the data


@pytest.mark.parametrize("S", [1, 3, 27, 300, 1000])
def test_sampler_runs_requested_number_of_steps(S):
    model = Gaussian()
    DDIMSampler(model).sample(S, 1, (1, 2, 2), verbose=False)
    assert len(model.calls) == S
    assert model.calls == sorted(model.calls, reverse=True)


def test_guidance_extrapolates_predictions():
    model = Gaussian()
    c, uc = torch.full((2, 1), 1.0), torch.full((2, 1), 0.5)
    x = torch.randn(2, 1, 2, 2)
    sampler = DDIMSampler(model)
    sampler.make_schedule(10)
    sampler.timesteps = sampler.ddim_timesteps
    plain = [sampler.predict(x, 5, cond).eps for cond in (uc, c)]
    sampler.options = SamplingOptions(unconditional_guidance_scale=3.0, unconditional_conditioning=uc)
    assert_close(sampler.predict(x, 5, c).eps, plain[0] + 3.0 * (plain[1] - plain[0]), 1e-6)


# -- options ---------------------------------------------------------------------------------------------------


def test_mask_keeps_known_region():
    model = Gaussian()
    known = torch.full((2, 1, 4, 4), -1.0)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    torch.manual_seed(0)
    x, _ = DDIMSampler(model).sample(50, 2, (1, 4, 4), mask=mask, x0=known, verbose=False)
    # The last step denoises the known region from timestep 1.
    assert (x[..., :2] + 1).abs().max() < 0.25
    assert (x[..., 2:] > -0.9).all()


def test_mask_without_x0_raises_value_error():
    with pytest.raises(ValueError, match="mask needs x0"):
        DDIMSampler(Gaussian()).sample(2, 1, (1, 2, 2), mask=torch.ones(1, 1, 2, 2), verbose=False)


def test_normals_sequence_replaces_sampled_noise():
    model, x_T = Gaussian(), torch.zeros(1, 1, 2, 2)
    torch.manual_seed(1)
    sampled, _ = DDIMSampler(model).sample(4, 1, (1, 2, 2), eta=1.0, x_T=x_T, verbose=False)
    torch.manual_seed(1)
    noises = [torch.randn(1, 1, 2, 2) for _ in range(4)]
    given, _ = DDIMSampler(model).sample(4, 1, (1, 2, 2), eta=1.0, x_T=x_T, normals_sequence=noises, verbose=False)
    assert torch.equal(given, sampled)


def test_temperature_zero_removes_step_noise():
    model, x_T = Gaussian(), torch.zeros(1, 1, 2, 2)
    samples = [
        DDIMSampler(model).sample(4, 1, (1, 2, 2), eta=1.0, x_T=x_T, temperature=0.0, verbose=False)[0]
        for _ in range(2)
    ]
    assert torch.equal(*samples)


def test_callbacks_receive_steps_and_estimates():
    model, seen, estimates = Gaussian(), [], []
    _, steps = DDIMSampler(model).sample(
        6,
        1,
        (1, 2, 2),
        callback=seen.append,
        img_callback=lambda x, i: estimates.append(x),
        log_every_t=2,
        verbose=False,
    )
    assert seen == list(range(6))
    assert [e.shape for e in estimates] == [(1, 1, 2, 2)] * 6
    assert len(steps["x_inter"]) == len(steps["pred_x0"]) == 1 + 4  # the start; positions 5, 4, 2, 0
    assert torch.equal(steps["pred_x0"][-1], estimates[-1])


def test_score_corrector_replaces_prediction():
    class Corrector:
        def modify_score(self, model, e_t, x, t, c, scale):
            return scale * e_t

    model, x_T = Gaussian(), torch.ones(1, 1, 2, 2)
    sampler = DDIMSampler(model)
    x, _ = sampler.sample(
        1, 1, (1, 2, 2), x_T=x_T, score_corrector=Corrector(), corrector_kwargs={"scale": 0.0}, verbose=False
    )
    alpha, alpha_prev = sampler.ddim_alphas[0], sampler.ddim_alphas_prev[0]
    assert_close(x, x_T * math.sqrt(alpha_prev / alpha), 1e-6)


def test_plms_nonzero_eta_raises_user_error():
    with pytest.raises(UserError, match="eta must be 0"):
        PLMSSampler(Gaussian()).sample(4, 1, (1, 2, 2), eta=0.5, verbose=False)


def test_conditioning_of_other_batch_size_raises_value_error():
    with pytest.raises(ValueError, match="conditioning for 3 samples, but batch_size is 2"):
        DDIMSampler(Gaussian()).sample(4, 2, (1, 2, 2), torch.zeros(3, 1), verbose=False)


def test_unknown_option_raises_type_error():
    with pytest.raises(TypeError, match="guidance"):
        DDIMSampler(Gaussian()).sample(4, 2, (1, 2, 2), guidance=3.0)


# -- partial runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_strength_one_equals_full_run(sampler):
    x_T = torch.randn(2, 1, 4, 4)
    whole, _ = sampler(Gaussian()).sample(20, 2, (1, 4, 4), x_T=x_T, verbose=False)
    started, _ = sampler(Gaussian()).sample(20, 2, (1, 4, 4), x_T=x_T, strength=1.0, verbose=False)
    assert torch.equal(whole, started)


@pytest.mark.parametrize("S", [10, 20])
def test_resumed_run_equals_full_run(S):
    """DDIM has no state, so a run can continue from an intermediate x_t."""
    whole, steps = DDIMSampler(Gaussian()).sample(S, 2, (1, 4, 4), log_every_t=1, verbose=False)
    half = steps["x_inter"][S // 2]
    again, _ = DDIMSampler(Gaussian()).sample(S, 2, (1, 4, 4), x_T=half, strength=0.5, verbose=False)
    assert torch.equal(whole, again)


@pytest.mark.parametrize(
    ("sampler", "S", "tol"), [(DDIMSampler, 1000, 0.02), (PLMSSampler, 100, 2e-3), (DPMSolverSampler, 100, 0.02)]
)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_partial_run_follows_probability_flow(sampler, S, tol, strength):
    """The exact solution keeps the quantile of x from timestep t to the data."""
    model = Gaussian()
    solver = sampler(model)
    solver.make_schedule(S)
    t = int(solver.ddim_timesteps[solver.position(strength)])
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    ended, _ = solver.sample(S, 4, (1, 4, 4), x_T=x, strength=strength, verbose=False)
    end = 1.0 if solver.ddim_timesteps[0] == 0 else model.alphas_cumprod[0]
    assert (ended - model.flow(x, model.alphas_cumprod[t], end)).abs().max() < tol


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_x0_is_noised_to_start_timestep(sampler):
    model, x0 = Gaussian(), torch.randn(2, 1, 4, 4)
    torch.manual_seed(1)
    _, steps = sampler(model).sample(20, 2, (1, 4, 4), x0=x0, strength=0.5, verbose=False)
    assert model.calls[0] < 500 <= model.calls[0] + 120
    torch.manual_seed(1)
    expected = model.q_sample(x0, torch.full((2,), model.calls[0]), torch.randn(2, 1, 4, 4))
    assert torch.equal(steps["x_inter"][0], expected)


@pytest.mark.parametrize(
    ("S", "strength", "steps"),
    [(50, 1.0, 50), (50, 0.75, 38), (50, 0.7, 35), (50, 0.02, 1), (50, 1e-6, 1), (1000, 0.7, 700), (7, 0.5, 4)],
)
def test_strength_is_share_of_steps(S, strength, steps):
    seen = []
    options = {"x_T": torch.zeros(1, 1, 2, 2), "callback": seen.append, "verbose": False}
    DDIMSampler(Gaussian()).sample(S, 1, (1, 2, 2), strength=strength, **options)
    assert seen == list(range(steps))


def test_partial_run_uses_normals_sequence_from_its_start():
    noises = [torch.full((1, 1, 2, 2), float(i)) for i in range(5)]
    options = {"x_T": torch.zeros(1, 1, 2, 2), "eta": 1.0, "strength": 0.5, "verbose": False}
    first, _ = DDIMSampler(Gaussian()).sample(10, 1, (1, 2, 2), normals_sequence=noises, **options)
    more, _ = DDIMSampler(Gaussian()).sample(10, 1, (1, 2, 2), normals_sequence=[*noises, *noises], **options)
    assert torch.equal(first, more)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": 0.5}, "x0, or x_T"), ({"strength": 0.0, "x_T": torch.zeros(1, 1, 2, 2)}, "above 0 and at most 1")],
)
def test_invalid_start_raises_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        DDIMSampler(Gaussian()).sample(5, 1, (1, 2, 2), **options)
