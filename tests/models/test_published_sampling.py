"""Published methods of samplers and models: parameters by position and by name, and overrides, which are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import Gaussian
from tiny_models import class_config, pixel_config, randomise

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import SamplingOptions

SHAPE = (1, 4, 4)
X_T = torch.linspace(-1, 1, 32).reshape(2, *SHAPE)
QUIET = {"x_T": X_T, "verbose": False}


def class_model(**params):
    torch.manual_seed(0)
    model = randomise(instantiate_from_config(class_config(**{"timesteps": 20, **params}))).eval()
    cond = model.get_learned_conditioning({"class_label": torch.tensor([1, 2])})
    return model, cond.detach()


# -- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_arguments_by_position_equal_arguments_by_name(sampler):
    c, numbers = torch.full((2, 1), 0.3), []
    args = (10, 2, SHAPE, c, numbers.append, None, None, False, 0.0, None, None, 1.0, 0.0, None, None, False, X_T)
    by_position, _ = sampler(Gaussian(), "linear", device="cpu").sample(*args)
    by_name, _ = sampler(Gaussian(), schedule="linear").sample(S=10, batch_size=2, shape=SHAPE, conditioning=c, **QUIET)
    assert torch.equal(by_position, by_name) and numbers == list(range(10))


def test_number_in_place_of_callback_is_an_error():
    with pytest.raises(TypeError, match=r"callback must be a function, not 0\.5; eta and others are keywords"):
        DDIMSampler(Gaussian()).sample(10, 2, SHAPE, None, 0.5)


def test_other_name_of_start_noise():
    expected, _ = DDIMSampler(Gaussian()).sample(10, 2, SHAPE, **QUIET)
    found, _ = DDIMSampler(Gaussian()).sample(10, 2, SHAPE, x_t=X_T, verbose=False, dynamic_threshold=None)
    assert torch.equal(found, expected)


def test_each_step_has_a_guidance_scale_of_its_own():
    c, uc = torch.full((2, 1), 1.0), torch.full((2, 1), 0.5)
    guidance = {"unconditional_conditioning": uc, **QUIET}
    constant, _ = DDIMSampler(Gaussian()).sample(5, 2, SHAPE, c, unconditional_guidance_scale=3.0, **guidance)
    scheduled, _ = DDIMSampler(Gaussian()).sample(5, 2, SHAPE, c, ucg_schedule=[3.0] * 5, **guidance)
    assert torch.equal(scheduled, constant)
    plain, _ = DDIMSampler(Gaussian()).sample(5, 2, SHAPE, c, ucg_schedule=[1.0] * 5, **guidance)
    assert torch.equal(plain, DDIMSampler(Gaussian()).sample(5, 2, SHAPE, c, **QUIET)[0])
    falling, _ = DDIMSampler(Gaussian()).sample(5, 2, SHAPE, c, ucg_schedule=np.linspace(3.0, 1.0, 5), **guidance)
    assert plain.mean() < falling.mean() < constant.mean()
    with pytest.raises(ValueError, match="ucg_schedule has 4 scales for 5 steps"):
        DDIMSampler(Gaussian()).sample(5, 2, SHAPE, c, ucg_schedule=[1.0] * 4, **guidance)


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_dynamic_threshold_is_refused(sampler):
    with pytest.raises(UserError, match="has no dynamic thresholding; leave out dynamic_threshold"):
        sampler(Gaussian()).sample(5, 2, SHAPE, dynamic_threshold=0.9, **QUIET)


# -- attributes ------------------------------------------------------------------------------------------------


def test_samplers_have_the_tables_of_the_model_and_of_the_steps():
    model, _ = class_model()
    sampler = DDIMSampler(model)
    with pytest.raises(AttributeError, match="has no ddim_alphas before make_schedule"):
        sampler.ddim_alphas  # noqa: B018
    sampler.make_schedule(ddim_num_steps=5, ddim_eta=0.5, verbose=False)
    assert sampler.ddpm_num_timesteps == 20 and sampler.schedule == "linear"
    assert sampler.betas is model.betas and sampler.alphas_cumprod_prev is model.alphas_cumprod_prev
    alphas = model.alphas_cumprod[sampler.ddim_timesteps]
    assert torch.equal(sampler.ddim_alphas, alphas)
    assert torch.equal(sampler.ddim_alphas_prev[1:], alphas[:-1])
    torch.testing.assert_close(sampler.ddim_sqrt_one_minus_alphas, (1 - alphas).sqrt())
    previous = sampler.ddim_alphas_prev
    sigmas = 0.5 * ((1 - previous) / (1 - alphas) * (1 - alphas / previous)).sqrt()
    torch.testing.assert_close(sampler.ddim_sigmas, sigmas)
    assert sampler.ddim_sigmas_for_original_num_steps.shape == (20,)
    sampler.register_buffer("own", torch.ones(1))
    sampler.betas = None
    assert sampler.own.device == model.device and sampler.betas is None


def test_assigned_table_is_used():
    class Noisier(DDIMSampler):
        def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
            super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)
            self.ddim_sigmas = torch.zeros_like(self.ddim_sigmas)

    still, _ = Noisier(Gaussian()).sample(10, 2, SHAPE, eta=1.0, **QUIET)
    deterministic, _ = DDIMSampler(Gaussian()).sample(10, 2, SHAPE, **QUIET)
    assert torch.equal(still, deterministic)


# -- overrides -------------------------------------------------------------------------------------------------


def counting(base, name):
    """Return a subclass of a sampler that counts the calls of a method."""

    def method(self, *args, **kwargs):
        self.calls.append(kwargs.get("index"))
        return getattr(base, name)(self, *args, **kwargs)

    return type("Client", (base,), {name: method, "calls": []})


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (DDIMSampler, "p_sample_ddim"),
        (DDIMSampler, "ddim_sampling"),
        (PLMSSampler, "p_sample_plms"),
        (PLMSSampler, "plms_sampling"),
        (PLMSSampler, "ddim_sampling"),
    ],
)
def test_override_is_called_and_the_samples_are_the_same(base, name):
    if (base, name) == (PLMSSampler, "ddim_sampling"):
        with pytest.raises(UserError, match=r"Client.ddim_sampling is never called by PLMS sampling; override plms_"):
            counting(base, name)(Gaussian())
        return
    client = counting(base, name)
    options = {"mask": torch.ones(1, 1, 1, 1), "x0": torch.zeros_like(X_T), **QUIET}
    for extra in ({}, options if base is DDIMSampler else {}):
        client.calls.clear()
        torch.manual_seed(0)
        expected, _ = base(Gaussian()).sample(7, 2, SHAPE, **{**QUIET, **extra})
        torch.manual_seed(0)
        found, _ = client(Gaussian()).sample(7, 2, SHAPE, **{**QUIET, **extra})
        assert torch.equal(found, expected)
        assert client.calls == (list(range(6, -1, -1)) if name.startswith("p_") else [None])


def test_method_of_an_instance_is_called():
    sampler, calls = DDIMSampler(Gaussian()), []
    step = sampler.p_sample_ddim
    sampler.p_sample_ddim = lambda *args, **kwargs: calls.append(kwargs["index"]) or step(*args, **kwargs)
    sampler.sample(4, 2, SHAPE, **QUIET)
    assert calls == [3, 2, 1, 0]


def test_step_of_another_method_is_refused_at_construction():
    with pytest.raises(UserError, match=r"Client.p_sample_ddim is never called by PLMS sampling; override plms_samp"):
        counting(PLMSSampler, "p_sample_ddim")(Gaussian())
    solver = type("Client", (DPMSolverSampler,), {"p_sample_ddim": lambda self, *args: None})
    with pytest.raises(UserError, match=r"Client.p_sample_ddim is never called by DPM-Solver"):
        solver(Gaussian())


def test_single_steps_make_up_the_run():
    """A program may write the loop itself, also with options of its own."""
    sampler, c, uc = DDIMSampler(Gaussian()), torch.full((2, 1), 1.0), torch.full((2, 1), 0.5)
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc}
    expected, _ = sampler.sample(6, 2, SHAPE, c, **guidance, **QUIET)
    sampler.make_schedule(ddim_num_steps=6, ddim_eta=0.0, verbose=False)
    x = X_T
    for index, step in reversed(list(enumerate(sampler.ddim_timesteps))):
        x, x_start = sampler.p_sample_ddim(x, c, torch.full((2,), step), index=index, **guidance)
    assert torch.equal(x, expected) and x_start.shape == x.shape
    assert sampler.options == SamplingOptions() and sampler.timesteps is None


def test_loop_over_all_timesteps_of_the_model():
    model, cond = class_model()
    whole = DDIMSampler(model)
    whole.make_schedule(ddim_num_steps=5, ddim_eta=0.0, verbose=False)
    x_T = torch.randn(2, 3, 8, 8)
    found, steps = whole.ddim_sampling(cond, x_T.shape, x_T=x_T, ddim_use_original_steps=True, log_every_t=1)
    expected, _ = DDIMSampler(model).sample(20, 2, (3, 8, 8), cond, x_T=x_T, verbose=False)
    assert len(steps["x_inter"]) == 21
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    _, steps = whole.ddim_sampling(cond, x_T.shape, x_T=x_T, timesteps=4, log_every_t=1)
    assert len(steps["x_inter"]) == 4, "as published, one step fewer"


# -- image to image, and inversion -----------------------------------------------------------------------------


def test_encoding_noises_to_a_position_of_the_grid():
    model, _ = class_model()
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    x0, noise = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    t = torch.tensor([0, 4, 10])
    found = sampler.stochastic_encode(x0, t, noise=noise)
    timesteps = torch.tensor([*sampler.ddim_timesteps[[0, 4]], 19])
    torch.testing.assert_close(found, model.q_sample(x0, timesteps, noise))
    torch.testing.assert_close(sampler.stochastic_encode(x0, timesteps, use_original_steps=True, noise=noise), found)


@pytest.mark.parametrize("original", [False, True])
def test_decoding_runs_the_first_steps(original):
    model, cond = class_model()
    sampler, numbers = DDIMSampler(model), []
    sampler.make_schedule(10, verbose=False)
    x = torch.randn(2, 3, 8, 8)
    found = sampler.decode(x, cond, 4, use_original_steps=original, callback=numbers.append)
    grid = np.arange(4) if original else sampler.ddim_timesteps[:4]
    assert numbers == [0, 1, 2, 3]
    assert sampler.decode(x, cond, 0) is x
    reference = DDIMSampler(model)
    reference.make_schedule(20 if original else 10, verbose=False)
    expected, _ = reference.run(x.shape, grid, cond, SamplingOptions(verbose=False), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_inversion_finds_the_latents_of_a_sample():
    """On the grid of all timesteps the inversion sees the timestep of each step."""
    sampler, numbers = DDIMSampler(Gaussian(timesteps=1000)), []
    sampler.alphas_cumprod_prev = torch.cat([torch.ones(1), sampler.model.alphas_cumprod[:-1]])
    sampler.make_schedule(10, verbose=False)
    x0 = 0.5 + 0.3 * torch.randn(2, *SHAPE, dtype=torch.float64)
    options = {"use_original_steps": True, "callback": numbers.append}
    encoded, out = sampler.encode(x0, None, 1000, return_intermediates=2, **options)
    exact = sampler.model.flow(x0, 1.0, sampler.model.alphas_cumprod[-1])
    assert (encoded - exact).abs().max() < 5e-2
    assert (sampler.decode(encoded, None, 1000, use_original_steps=True) - x0).abs().max() < 2e-2
    assert numbers == list(range(1000)) and out["intermediate_steps"] == [0, 500, 998, 999]
    assert torch.equal(out["x_encoded"], encoded) and torch.equal(out["intermediates"][-1], encoded)
    with pytest.raises(ValueError, match="t_enc is 11, but the grid has 10 steps"):
        sampler.encode(x0, None, 11)


# -- ancestral sampling ----------------------------------------------------------------------------------------


def test_ancestral_steps_of_the_model_make_up_its_loop():
    model, cond = class_model()
    x = x_T = torch.randn(2, 3, 8, 8)
    torch.manual_seed(1)
    expected = model.p_sample_loop(cond, x_T.shape, x_T=x_T, verbose=False)
    torch.manual_seed(1)
    for i in reversed(range(20)):
        t = torch.full((2,), i)
        x, x_start = model.p_sample(x, cond, t, return_x0=True)
    assert torch.equal(x, expected) and x_start.shape == x.shape
    mean, variance, _, estimate = model.p_mean_variance(
        x_T, cond, torch.tensor([9, 9]), clip_denoised=True, return_x0=True
    )
    assert estimate.abs().max() <= 1.0 and torch.equal(variance, model.posterior_variance[[9, 9]].view(2, 1, 1, 1))
    torch.testing.assert_close(mean, model.q_posterior(estimate, x_T, torch.tensor([9, 9]))[0])


def test_sampling_methods_of_pixel_models_have_no_conditioning():
    torch.manual_seed(0)
    model = randomise(instantiate_from_config(pixel_config(timesteps=20))).eval()
    torch.manual_seed(2)
    first, steps = model.sample(2, True, verbose=False)
    torch.manual_seed(2)
    assert torch.equal(model.p_sample_loop((2, 3, 8, 8), verbose=False), first) and torch.equal(steps[-1], first)
    loss, _ = model.p_losses(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.ones(2, 3, 8, 8))
    assert loss.shape == () and model(torch.zeros(2, 3, 8, 8), noise=torch.ones(2, 3, 8, 8))[0].shape == ()
    assert model.p_sample(first, torch.tensor([3, 3]), clip_denoised=False, repeat_noise=True).shape == first.shape


def test_callbacks_of_ancestral_sampling_get_timesteps():
    model, cond = class_model()
    steps, seen = [], []
    sample, inter = model.p_sample_loop(
        cond,
        (2, 3, 8, 8),
        True,
        None,
        False,
        steps.append,
        5,
        img_callback=lambda x, i: seen.append((x, i)),
        log_every_t=1,
    )
    assert steps == [4, 3, 2, 1, 0] == [i for _, i in seen]
    assert torch.equal(seen[-1][0], sample) and len(inter) == 6


class OwnStep(LatentDiffusion):
    """Client that ends at twice the mean of its last step."""

    def p_sample(self, x, c, t, clip_denoised=False, repeat_noise=False, return_codebook_ids=False, **kwargs):
        x_prev, x0 = super().p_sample(x, c, t, clip_denoised, repeat_noise, return_codebook_ids, **kwargs)
        return (2 * x_prev if int(t[0]) == 0 else x_prev), x0


class OwnEstimate(DDPM):
    """Client whose estimate of x_0 is zero."""

    def predict_start_from_noise(self, x_t, t, noise):
        return 0 * super().predict_start_from_noise(x_t, t, noise)


class OwnMoments(DDPM):
    """Client that clips its estimates in another way."""

    def p_mean_variance(self, x, t, clip_denoised):
        mean, variance, log_variance = super().p_mean_variance(x, t, clip_denoised)
        return mean.clamp(-0.1, 0.1), variance, log_variance


def test_overridden_steps_of_models_are_used_by_every_ancestral_run():
    config = class_config(timesteps=20)
    torch.manual_seed(0)
    model = randomise(OwnStep(**config["params"])).eval()
    plain, cond = class_model()
    plain.load_state_dict(model.state_dict())
    x_T = torch.randn(2, 3, 8, 8)

    def run(model):
        torch.manual_seed(3)
        options = SamplingOptions(verbose=False)
        direct, _ = AncestralSampler(model).run(x_T.shape, np.arange(6), cond, options, x_T)
        torch.manual_seed(3)
        assert torch.equal(model.p_sample_loop(cond, x_T.shape, x_T=x_T, timesteps=6, verbose=False), direct)
        return direct

    assert torch.equal(run(model), 2 * run(plain))
    with pytest.raises(ValueError, match="OwnStep overrides p_sample, which has no guidance"):
        guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": cond}
        model.sample(cond, 2, verbose=False, **guidance)
    pixels = randomise(OwnMoments(**pixel_config(timesteps=20)["params"])).eval()
    assert pixels.sample(2, verbose=False).abs().max() <= 0.1
    empty = randomise(OwnEstimate(**pixel_config(timesteps=20)["params"])).eval()
    assert not empty.sample(2, verbose=False).any()


# -- construction ----------------------------------------------------------------------------------------------


def test_overridden_builders_are_called():
    calls = []

    class Client(LatentDiffusion):
        def register_schedule(self, given_betas=None, beta_schedule="linear", timesteps=1000, **kwargs):
            calls.append(("schedule", beta_schedule, timesteps))
            super().register_schedule(given_betas, "cosine", timesteps, **kwargs)

        def make_cond_schedule(self):
            calls.append(("cond schedule", self.num_timesteps_cond))
            self.cond_ids = torch.zeros(self.num_timesteps, dtype=torch.long)

        def instantiate_first_stage(self, config):
            calls.append("first stage")
            super().instantiate_first_stage(config)

        def instantiate_cond_stage(self, config):
            calls.append("cond stage")
            super().instantiate_cond_stage(config)

    model = Client(**class_config(num_timesteps_cond=5, timesteps=20)["params"])
    assert calls == [("schedule", "linear", 20), ("cond schedule", 5), "first stage", "cond stage"]
    plain, _ = class_model(beta_schedule="cosine")
    assert torch.equal(model.betas, plain.betas) and model.cond_ids.sum() == 0
    assert (plain.num_downs, plain.linear_start, plain.v_posterior) == (1, 0.0015, 0.0)


def test_tiling_is_switched_off_by_deletion():
    model, _ = class_model()
    model.split_input_params = {"ks": (4, 4), "stride": (2, 2), "clip_min_weight": 0.01, "clip_max_weight": 0.5}
    x = torch.randn(2, 3, 8, 8)
    fold, unfold, normalization, weighting = model.get_fold_unfold(x, (4, 4), (2, 2))
    tiles = unfold(x).view(2, 3, 4, 4, -1)
    whole = fold((tiles * weighting).view(2, 48, -1)) / normalization
    torch.testing.assert_close(whole, x)
    fold, unfold, normalization, weighting = model.get_fold_unfold(x, (4, 4), (2, 2), uf=2)
    assert normalization.shape == (1, 1, 16, 16) and weighting.shape == (1, 1, 8, 8, 9)
    assert model.meshgrid(2, 3)[1, 2].tolist() == [1, 2] and model.delta_border(3, 3)[1, 1] == 0.5
    del model.split_input_params
    assert not hasattr(model, "split_input_params")


def test_published_question_about_tiling_is_answered():
    class Client(LatentDiffusion):
        def decode_first_stage(self, z, predict_cids=False, force_not_quantize=False):
            if hasattr(self, "split_input_params") and self.split_input_params["patch_distributed_vq"]:
                return "tiles"
            return super().decode_first_stage(z, predict_cids, force_not_quantize)

    model = Client(**class_config(timesteps=20)["params"])
    assert model.decode_first_stage(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 16, 16)
    model.split_input_params = {"ks": (4, 4), "stride": (2, 2), "vqf": 2, "patch_distributed_vq": True} | {
        "clip_min_weight": 0.01,
        "clip_max_weight": 0.5,
    }
    assert model.decode_first_stage(torch.zeros(1, 3, 8, 8)) == "tiles"
    model.split_input_params = None
    assert not hasattr(model, "split_input_params")


def test_overridden_tiling_is_refused_if_it_is_never_called():
    class Client(LatentDiffusion):
        def get_weighting(self, h, w, Ly, Lx, device):
            return torch.ones(1, h * w, Ly * Lx)

    class Own(Client):
        def apply_model(self, x_noisy, t, cond, return_ids=False):
            return self.get_weighting(1, 1, 1, 1, None)

    params = {"ks": (4, 4), "stride": (2, 2), "clip_min_weight": 0.01, "clip_max_weight": 0.5}
    with pytest.raises(UserError, match=r"Client.get_weighting is never called by tiled processing"):
        Client(**class_config(timesteps=20)["params"]).split_input_params = params
    Own(**class_config(timesteps=20)["params"]).split_input_params = params
