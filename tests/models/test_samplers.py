"""Samplers against recorded samples, and against closed forms on a Gaussian target."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import Gaussian, Told
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
def test_ddim_gives_the_recorded_samples(name):
    assert_replayed(name)


def test_the_start_noise_is_the_first_draw_of_the_seed():
    assert_replayed("ddim_unconditional_eta0", "first_noise")


def test_plms_gives_the_recorded_samples():
    assert_replayed("plms_unconditional")


@pytest.mark.parametrize("name", ["ddim_class_guidance", "plms_class_guidance"])
def test_guidance_gives_the_recorded_samples(name):
    assert_replayed(name)


@pytest.mark.parametrize(
    "form", [lambda c: c, lambda c: [c], lambda c: {"c_crossattn": [c]}, lambda c: {"c_crossattn": c}]
)
def test_every_form_of_conditioning_gives_the_same_guided_sample(form):
    case, model = model_of("ddim_class_guidance")
    c = model.get_learned_conditioning({"class_label": torch.tensor([2, 7])})
    uc = model.get_learned_conditioning({"class_label": torch.tensor([10, 10])})
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": form(uc)}
    torch.manual_seed(11)
    latent, _ = DDIMSampler(model).sample(5, 2, SHAPE, form(c), **guidance, **PUBLISHED)
    assert_close(latent, case.outputs["latent"])


class HybridGaussian(Gaussian):
    """The mean is the sum of what is concatenated and what is attended to."""

    def apply_model(self, x, t, cond):
        (concatenated,), (attended,) = cond["c_concat"], cond["c_crossattn"]
        return Gaussian(concatenated + attended[:, :, None], self.std).apply_model(x, t, None)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_hybrid_conditioning_is_guided_as_a_dict_of_lists(sampler):
    """The prediction is affine in the mean, so guided sampling is sampling towards the guided mean."""
    concatenated, x_T = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    words, none = torch.full((2, 1, 1), 0.4), torch.full((2, 1, 1), -0.2)
    c, uc = ({"c_concat": [concatenated], "c_crossattn": [each]} for each in (words, none))
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc}
    guided, _ = sampler(HybridGaussian()).sample(8, 2, (1, 4, 4), c, x_T=x_T, verbose=False, **guidance)
    towards = Gaussian(concatenated + (none + 3.0 * (words - none))[:, :, None])
    assert_close(guided, sampler(towards).sample(8, 2, (1, 4, 4), x_T=x_T, verbose=False)[0], 1e-5)


def test_ancestral_sampling_gives_the_recorded_sample():
    assert_replayed("ddpm_ancestral")


def test_progressive_denoising_gives_the_recorded_sample():
    assert_replayed("ddpm_progressive")


def test_inpainting_by_concatenation():
    assert_replayed("inpainting_pipeline")


def test_super_resolution_by_concatenation():
    assert_replayed("super_resolution_pipeline")


def test_semantic_synthesis():
    assert_replayed("semantic_synthesis_pipeline")


def test_text_to_image():
    assert_replayed("text_to_image_pipeline")


# -- closed forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize(("sampler", "S", "tol"), [(DDIMSampler, 500, 2e-2), (PLMSSampler, 100, 2e-2)])
def test_deterministic_samplers_follow_the_probability_flow(sampler, S, tol, parameterization):
    model = Gaussian(parameterization=parameterization)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    sample, _ = sampler(model).sample(S, 1, (1, 3, 3), x_T=x_T, verbose=False)
    assert_close(sample, model.flow(x_T, model.alphas_cumprod[-1]), tol)


def run(sampler, S, x_T, **options):
    """S steps of any sampler from given noise."""
    options = {"verbose": False, **options}
    if isinstance(sampler, AncestralSampler):
        return sampler.run(x_T.shape, np.arange(S), None, SamplingOptions(**options), x_T)[0]
    return sampler.sample(S, len(x_T), x_T.shape[1:], x_T=x_T, **options)[0]


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler, AncestralSampler])
def test_every_parameterization_gives_the_same_trajectory(sampler):
    x_T, ends = torch.randn(1, 1, 4, 4, dtype=torch.float64), []
    for parameterization in ("eps", "x0", "v"):
        torch.manual_seed(0)
        model = Gaussian(parameterization=parameterization, timesteps=50)
        ends.append(run(sampler(model), 10, x_T))
    assert_close(ends[1], ends[0], 1e-9)
    assert_close(ends[2], ends[0], 1e-9)


@pytest.mark.parametrize("sampler", [DDIMSampler, AncestralSampler])
def test_a_full_step_at_eta_one_is_the_posterior_of_the_chain(sampler):
    """x_{t-1} = a x_t + b x_0 + c z, for each step of the model; q(x_{t-1} | x_t, x_0) by Bayes' rule."""
    T, (x, x_start, z) = 30, torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1, 1)
    model = Told(x_start, T)
    sampler = sampler(model)
    if isinstance(sampler, DDIMSampler):
        sampler.make_schedule(T, ddim_eta=1.0)
    sampler.timesteps, sampler.options = np.arange(T), SamplingOptions(normals_sequence=[z] * T)
    betas, alphas = (model.tables[name] for name in ("betas", "alphas_cumprod"))
    for t in range(T):
        a, b, c = sampler.step(x, t, None)[0].flatten()
        if t == 0:  # the data are reached
            expected = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        else:
            precisions = (1 - betas[t]) / betas[t], 1 / (1 - alphas[t - 1])  # of x_t = √(1 - β) x_{t-1} + √β ε; of q
            variance = 1 / sum(precisions)
            gains = precisions[0] / (1 - betas[t]).sqrt(), precisions[1] * alphas[t - 1].sqrt()
            expected = torch.stack([variance * gains[0], variance * gains[1], variance.sqrt()])
        assert_close(torch.stack([a, b, c]), expected, 1e-9)


def end_law(sampler, S, **options):
    """Mean and deviation of what a sampler draws, exactly.

    For Gaussian data every sampler is an affine map of its draws: x_T and the S step noises. Item 0 of the batch
    has them all at zero, each other item has one of them at one.
    """
    draws = torch.eye(S + 2, dtype=torch.float64)[:, 1:, None, None, None]
    ends = run(sampler, S, draws[:, 0], normals_sequence=list(draws[:, 1:].movedim(1, 0)), **options).flatten()
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
def test_every_sampler_ends_in_the_law_of_the_data(sampler, S, eta, tol):
    model = Gaussian()
    mean, std = end_law(sampler(model), S, **({} if eta is None else {"eta": eta}))
    # x_T is drawn from N(0, 1), which is not quite the law of x_T: solvers of the ODE keep the difference.
    start = model.flow(0.0, model.alphas_cumprod[-1]) if eta == 0 else model.mean
    assert mean == pytest.approx(start, abs=tol)
    assert std == pytest.approx(model.std, abs=tol)


def test_ddim_at_eta_one_on_all_steps_draws_what_ancestral_sampling_draws():
    model = Gaussian(timesteps=300)
    assert end_law(DDIMSampler(model), 300, eta=1.0) == pytest.approx(end_law(AncestralSampler(model), 300), rel=1e-9)


def chain_moments(model):
    """Mean and deviation at the end of the reverse chain: every step is linear in x and adds Gaussian noise."""
    mean, variance = 0.0, 1.0
    for t in reversed(range(model.num_timesteps)):
        c1, c2 = (float(model.tables[f"posterior_mean_coef{i}"][t]) for i in (1, 2))
        alpha = float(model.alphas_cumprod[t])
        gain = math.sqrt(alpha) * model.std**2 / (alpha * model.std**2 + 1 - alpha)
        factor = c1 * gain + c2
        mean = factor * mean + c1 * model.mean * (1 - gain * math.sqrt(alpha))
        variance = factor**2 * variance + float(model.tables["posterior_variance"][t])
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("draw", ["ancestral", "ddim"])
def test_stochastic_samplers_reach_the_target_distribution(draw):
    model = Gaussian(timesteps=200)
    torch.manual_seed(0)
    if draw == "ancestral":
        sampler = AncestralSampler(model)
        x, _ = sampler.run((64, 1, 16, 16), torch.arange(200).numpy(), None, SamplingOptions(verbose=False))
    else:
        x, _ = DDIMSampler(model).sample(200, 64, (1, 16, 16), eta=1.0, verbose=False)
    mean, std = chain_moments(model)
    # 16,384 independent pixels: the standard error of the mean is 0.0023, that of the deviation 0.0017.
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.std().item() == pytest.approx(std, abs=0.007)
    assert (mean, std) == pytest.approx((0.5, 0.3), abs=0.012)  # and the chain itself is near the data


@pytest.mark.parametrize("S", [1, 3, 27, 300, 1000])
def test_exactly_the_steps_asked_for_are_run(S):
    model = Gaussian()
    DDIMSampler(model).sample(S, 1, (1, 2, 2), verbose=False)
    assert len(model.calls) == S
    assert model.calls == sorted(model.calls, reverse=True)


def test_guidance_moves_along_the_difference():
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


def test_the_known_part_is_kept():
    model = Gaussian()
    known = torch.full((2, 1, 4, 4), -1.0)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    torch.manual_seed(0)
    x, _ = DDIMSampler(model).sample(50, 2, (1, 4, 4), mask=mask, x0=known, verbose=False)
    # The last blend is noised to step 1, the last step then denoises it.
    assert (x[..., :2] + 1).abs().max() < 0.25
    assert (x[..., 2:] > -0.9).all()


def test_a_mask_needs_what_it_keeps():
    with pytest.raises(ValueError, match="mask needs x0"):
        DDIMSampler(Gaussian()).sample(2, 1, (1, 2, 2), mask=torch.ones(1, 1, 2, 2), verbose=False)


def test_given_noises_take_the_place_of_drawn_ones():
    model, x_T = Gaussian(), torch.zeros(1, 1, 2, 2)
    torch.manual_seed(1)
    drawn, _ = DDIMSampler(model).sample(4, 1, (1, 2, 2), eta=1.0, x_T=x_T, verbose=False)
    torch.manual_seed(1)
    noises = [torch.randn(1, 1, 2, 2) for _ in range(4)]
    given, _ = DDIMSampler(model).sample(4, 1, (1, 2, 2), eta=1.0, x_T=x_T, normals_sequence=noises, verbose=False)
    assert torch.equal(given, drawn)


def test_temperature_zero_removes_the_noise_that_eta_adds():
    model, x_T = Gaussian(), torch.zeros(1, 1, 2, 2)
    draws = [
        DDIMSampler(model).sample(4, 1, (1, 2, 2), eta=1.0, x_T=x_T, temperature=0.0, verbose=False)[0]
        for _ in range(2)
    ]
    assert torch.equal(*draws)


def test_callbacks_see_every_step_and_the_estimates():
    model, seen, pictures = Gaussian(), [], []
    _, steps = DDIMSampler(model).sample(
        6,
        1,
        (1, 2, 2),
        callback=seen.append,
        img_callback=lambda x, i: pictures.append(x),
        log_every_t=2,
        verbose=False,
    )
    assert seen == list(range(6))
    assert [p.shape for p in pictures] == [(1, 1, 2, 2)] * 6
    assert len(steps["x_inter"]) == len(steps["pred_x0"]) == 1 + 4  # the start; positions 5, 4, 2, 0
    assert torch.equal(steps["pred_x0"][-1], pictures[-1])


def test_a_score_corrector_replaces_the_prediction():
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


def test_plms_is_deterministic_and_says_so():
    with pytest.raises(UserError, match="eta must be 0"):
        PLMSSampler(Gaussian()).sample(4, 1, (1, 2, 2), eta=0.5, verbose=False)


def test_a_conditioning_of_another_batch_size_is_refused():
    with pytest.raises(ValueError, match="conditioning for 3 samples, but batch_size is 2"):
        DDIMSampler(Gaussian()).sample(4, 2, (1, 2, 2), torch.zeros(3, 1), verbose=False)


def test_unknown_options_are_errors():
    with pytest.raises(TypeError, match="guidance"):
        DDIMSampler(Gaussian()).sample(4, 2, (1, 2, 2), guidance=3.0)


# -- starting part of the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_from_the_top_of_the_grid_a_run_is_the_whole_run(sampler):
    x_T = torch.randn(2, 1, 4, 4)
    whole, _ = sampler(Gaussian()).sample(20, 2, (1, 4, 4), x_T=x_T, verbose=False)
    started, _ = sampler(Gaussian()).sample(20, 2, (1, 4, 4), x_T=x_T, strength=1.0, verbose=False)
    assert torch.equal(whole, started)


@pytest.mark.parametrize("S", [10, 20])
def test_a_run_that_is_taken_up_again_ends_where_it_would_have(S):
    """DDIM has no memory: the second half from where the first one ended gives the same."""
    whole, steps = DDIMSampler(Gaussian()).sample(S, 2, (1, 4, 4), log_every_t=1, verbose=False)
    half = steps["x_inter"][S // 2]
    again, _ = DDIMSampler(Gaussian()).sample(S, 2, (1, 4, 4), x_T=half, strength=0.5, verbose=False)
    assert torch.equal(whole, again)


@pytest.mark.parametrize(
    ("sampler", "S", "tol"), [(DDIMSampler, 1000, 0.02), (PLMSSampler, 100, 2e-3), (DPMSolverSampler, 100, 0.02)]
)
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_a_started_run_follows_the_probability_flow_from_there(sampler, S, tol, strength):
    """From x at step t the exact solution keeps its quantile down to the data."""
    model = Gaussian()
    solver = sampler(model)
    solver.make_schedule(S)
    t = int(solver.ddim_timesteps[solver.position(strength)])
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    ended, _ = solver.sample(S, 4, (1, 4, 4), x_T=x, strength=strength, verbose=False)
    end = 1.0 if solver.ddim_timesteps[0] == 0 else model.alphas_cumprod[0]
    assert (ended - model.flow(x, model.alphas_cumprod[t], end)).abs().max() < tol


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_a_known_latent_is_noised_to_the_step_that_the_run_starts_from(sampler):
    model, x0 = Gaussian(), torch.randn(2, 1, 4, 4)
    torch.manual_seed(1)
    _, steps = sampler(model).sample(20, 2, (1, 4, 4), x0=x0, strength=0.5, verbose=False)
    assert model.calls[0] < 500 <= model.calls[0] + 120
    torch.manual_seed(1)
    expected = model.q_sample(x0, torch.full((2,), model.calls[0]), torch.randn(2, 1, 4, 4))
    assert torch.equal(steps["x_inter"][0], expected)


@pytest.mark.parametrize(
    ("S", "strength", "walked"),
    [(50, 1.0, 50), (50, 0.75, 38), (50, 0.7, 35), (50, 0.02, 1), (50, 1e-6, 1), (1000, 0.7, 700), (7, 0.5, 4)],
)
def test_the_strength_is_the_share_of_steps(S, strength, walked):
    seen = []
    options = {"x_T": torch.zeros(1, 1, 2, 2), "callback": seen.append, "verbose": False}
    DDIMSampler(Gaussian()).sample(S, 1, (1, 2, 2), strength=strength, **options)
    assert seen == list(range(walked))


def test_given_noises_are_used_from_the_first_step_of_a_started_run():
    noises = [torch.full((1, 1, 2, 2), float(i)) for i in range(5)]
    options = {"x_T": torch.zeros(1, 1, 2, 2), "eta": 1.0, "strength": 0.5, "verbose": False}
    first, _ = DDIMSampler(Gaussian()).sample(10, 1, (1, 2, 2), normals_sequence=noises, **options)
    more, _ = DDIMSampler(Gaussian()).sample(10, 1, (1, 2, 2), normals_sequence=[*noises, *noises], **options)
    assert torch.equal(first, more)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": 0.5}, "x0, or x_T"), ({"strength": 0.0, "x_T": torch.zeros(1, 1, 2, 2)}, "above 0 and at most 1")],
)
def test_a_start_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDIMSampler(Gaussian()).sample(5, 1, (1, 2, 2), **options)
