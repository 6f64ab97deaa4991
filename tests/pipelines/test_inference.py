"""From files to pictures: loading, devices, guidance."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from parity_cases import assert_close, build, load_case
from tiny_models import randomise, text_config, write_model
from torch import nn

from ldm import inference
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import ImageSize, read_config
from ldm.config.model_files import find_model, named_model
from ldm.errors import UserError
from ldm.modules.attention import BasicTransformerBlock
from ldm.pipelines.loading import build_model, choose_device, for_inference, load_model, skip_init
from ldm.pipelines.sampling import SamplerSettings, prepared, text_to_images, unknown_words

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "config.yaml", folder / "model.ckpt")


def draw(model, prompts, seed=0, **settings):
    torch.manual_seed(seed)
    return text_to_images(model, prompts, (8, 8), SamplerSettings(steps=4, **settings))


def test_a_loaded_model_is_the_saved_one(folder, model):
    original = write_model(folder)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_building_leaves_the_generator_and_torch_alone(folder):
    """Initial values are not drawn, yet what constructors compute, such as the schedule, is there."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with skip_init():
        module = instantiate_from_config(text_config())
        nn.Linear(5, 5)
    assert torch.equal(torch.rand(4), expected)
    assert 0 < float(module.betas[0]) < float(module.betas[-1]) < 1
    assert nn.init.ones_(torch.zeros(2)).sum() == 2


def test_parameters_younger_than_the_file_get_initial_values(folder, monkeypatch):
    weights = instantiate_from_config(text_config()).state_dict()
    gone = "first_stage_model.decoder.norm_out.weight"
    del weights[gone]
    original = inference.instantiate_from_config

    def dirty(config):
        """As if memory had held something else before."""
        module = original(config)
        if nn.init.ones_(torch.zeros(1)) == 0:
            module.state_dict()[gone].fill_(float("nan"))
        return module

    monkeypatch.setattr(inference, "instantiate_from_config", dirty)
    built = build_model(text_config(), weights, "the test's weights")
    assert (built.state_dict()[gone] == 1).all()


@pytest.mark.parametrize("use_ema", [True, False])
def test_averages_are_used_as_the_configuration_says(tmp_path, use_ema):
    trained = instantiate_from_config(text_config(use_ema=True))
    trained.model_ema.num_updates.fill_(9)
    live = trained.model.diffusion_model.out[-1].bias
    trained.model_ema.diffusion_modelout2bias.fill_(7.0)
    write_model(tmp_path, text_config(use_ema=use_ema))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "model.ckpt")
    loaded = load_model(tmp_path / "config.yaml", tmp_path / "model.ckpt")
    bias = loaded.model.diffusion_model.out[-1].bias
    assert (bias == 7).all() if use_ema else torch.equal(bias, live)
    with loaded.ema_scope():
        assert loaded.model.diffusion_model.out[-1].bias is bias


def test_what_serves_training_alone_is_left_out():
    config = text_config(use_ema=True, ckpt_path="gone.ckpt")
    inner = config["params"]["first_stage_config"]["params"]
    inner |= {"ckpt_path": "gone.ckpt", "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator"}}
    params = for_inference(config, {"first_stage_model.x": torch.ones(1)})["params"]
    assert params["use_ema"] is False and "ckpt_path" not in params
    assert params["first_stage_config"]["params"]["lossconfig"] == {"target": "torch.nn.Identity"}
    assert "ckpt_path" not in params["first_stage_config"]["params"]
    kept = for_inference(config, {"model.x": torch.ones(1)})["params"]["first_stage_config"]["params"]
    assert kept["ckpt_path"] == "gone.ckpt", "weights that are elsewhere are still read from there"
    assert inner["ckpt_path"] == "gone.ckpt" and config["params"]["use_ema"], "the given configuration is unchanged"


def test_the_same_seed_gives_the_same_picture(model):
    first, again, other = draw(model, ["a", "b"]), draw(model, ["a", "b"]), draw(model, ["a", "b"], seed=1)
    assert first.shape == (2, 3, 16, 16) and first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_guidance_follows_the_prompt_and_leaves_the_negative_one(model):
    """At scale s the network's answer is u + s (c - u), so at scale 0 only the negative prompt counts."""
    settings = SamplerSettings(steps=4, scale=0.0)
    noise = torch.randn(1, 3, 8, 8)
    negative = text_to_images(model, ["rocket"], (8, 8), settings, "fox", noise=noise)
    fox = text_to_images(model, ["fox"], (8, 8), SamplerSettings(steps=4), noise=noise)
    assert_close(negative, fox)


def test_given_noise_makes_pictures_independent_of_their_batch(model):
    noise = torch.randn(3, 3, 8, 8)
    settings, prompts = SamplerSettings(steps=3, scale=2.0), ["rocket", "fox", "red heart"]
    together = text_to_images(model, prompts, (8, 8), settings, noise=noise)
    apart = [text_to_images(model, [p], (8, 8), settings, noise=noise[i : i + 1]) for i, p in enumerate(prompts)]
    assert_close(torch.cat(apart), together)


def test_each_name_is_another_sampler(model):
    noise = torch.randn(1, 3, 8, 8)
    settings = [SamplerSettings(name, steps=8) for name in ("ddim", "plms", "dpm")]
    ddim, plms, dpm = (text_to_images(model, ["fox"], (8, 8), each, noise=noise) for each in settings)
    assert not torch.equal(ddim, plms) and not torch.equal(ddim, dpm) and not torch.equal(plms, dpm)
    with pytest.raises(UserError, match=r'no sampler "dmp" \(did you mean "dpm"\?\); choose ddim, plms, dpm'):
        text_to_images(model, ["fox"], (8, 8), SamplerSettings("dmp"))


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_progress_counts_every_step(model, sampler):
    from tqdm import tqdm

    with tqdm(total=5, disable=False) as progress:
        text_to_images(model, ["a"], (8, 8), SamplerSettings(sampler, steps=5), progress=progress)
        assert progress.n == 5


def test_bfloat16_draws_nearly_the_same_picture(folder, model):
    half = load_model(folder / "config.yaml", folder / "model.ckpt", "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.alphas_cumprod.dtype == torch.float32
    noise = torch.randn(2, 3, 8, 8)
    settings = SamplerSettings(steps=4, scale=2.0)
    pictures = [text_to_images(m, ["a", "b"], (8, 8), settings, noise=noise) for m in (half, model)]
    assert pictures[0].dtype == torch.float32
    assert_close(*pictures, tol=0.1)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_a_prepared_model_draws_the_same_pictures(model, monkeypatch, sampler):
    """Packed weights and kept keys change rounding only."""
    settings, noise = SamplerSettings(sampler, steps=6, scale=3.0), torch.randn(2, 3, 8, 8)

    def picture():
        return text_to_images(model, ["a", "b"], (8, 8), settings, noise=noise)

    with prepared(model):
        together = [picture(), picture()]
    alone = picture()
    monkeypatch.setattr(inference, "prepared", nullcontext)
    plain = picture()
    for drawn in (alone, *together):
        assert_close(drawn, plain, 1e-4)


class Corrector:
    """Halves the predicted noise, by a method of the interface of a `score_corrector`."""

    def modify_score(self, model, e_t, x, t, c, strength=1.0):
        return e_t * (1 - 0.5 * strength)


def test_a_prepared_model_fills_masks_with_guidance_and_a_corrector(model):
    """All that a run may be given at once: what joins and splits batches must not meet another's keys."""
    noise, known, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    options = {"score_corrector": Corrector(), "corrector_kwargs": {"strength": 0.5}, "x0": known, "mask": mask}

    def latents():
        torch.manual_seed(5)
        both = model.get_learned_conditioning(["a", "b"]), model.get_learned_conditioning(["", ""])
        guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": both[1]}
        sampler = inference.make_sampler("ddim", model)
        return sampler.sample(4, 2, (3, 8, 8), both[0], x_T=noise, verbose=False, **guided, **options)[0]

    with torch.no_grad():
        plain = latents()
        with prepared(model):
            assert_close(latents(), plain, 1e-4)
            assert_close(latents(), plain, 1e-4)


def averaged_model():
    model = instantiate_from_config(text_config(use_ema=True)).eval()
    for index, shadow in enumerate(randomise(model).model_ema.buffers()):
        if shadow.is_floating_point() and shadow.dim():
            shadow.add_(0.02 * (index % 3))
    return model.requires_grad_(False)


@pytest.mark.parametrize("runs_before", [0, 1], ids=["before the first run", "after a run"])
def test_averages_do_not_take_the_place_of_prepared_weights(runs_before):
    """Once swapped, packed weights were lost: the averages were put back as the model's own."""
    model = averaged_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with prepared(model):
        for _ in range(runs_before):
            draw(model, ["a"])
        with pytest.raises(UserError, match="enter ema_scope first"), model.ema_scope():
            draw(model, ["a"])
        with pytest.raises(UserError, match="enter ema_scope first"):
            model.model_ema.copy_to(model.model)
        draw(model, ["a"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_model_is_prepared_with_its_averages(monkeypatch):
    model = averaged_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    live = draw(model, ["a"])
    with model.ema_scope(), prepared(model):
        averaged = draw(model, ["a"])
    monkeypatch.setattr(inference, "prepared", nullcontext)
    with model.ema_scope():
        assert_close(averaged, draw(model, ["a"]), 1e-4)
    assert not torch.equal(averaged, live)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_run_computes_the_keys_of_its_context_once(model):
    """Guidance too, which runs on both conditionings joined; and every run anew."""
    layer = next(m for m in model.model.modules() if isinstance(m, BasicTransformerBlock)).attn2
    batches = []
    hook = layer.to_k.register_forward_hook(lambda module, inputs, output: batches.append(len(output)))
    draw(model, ["a", "b", "c"], scale=2.0)
    draw(model, ["a"])
    hook.remove()
    assert batches == [6, 1]
    assert layer.cache is None


def test_a_prepared_model_is_plain_again_afterwards(folder, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with prepared(model):
        draw(model, ["a"])
        assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_the_network_and_the_decoder_are_packed(model):
    with prepared(model):
        draw(model, ["a"])
        for layer in (model.model.diffusion_model.input_blocks[0][0], model.first_stage_model.decoder.conv_out):
            assert layer.weight.layout == torch._mkldnn


def test_the_recorded_pictures_come_out(monkeypatch):
    """The published text-to-image pipeline, seed to pixels. Its captions were token ids; the empty one was zeros."""
    case = load_case("text_to_image_pipeline")
    model, encode = build(case), type(build(case)).get_learned_conditioning
    tokens = case.inputs["tokens"]
    ids = {"first": tokens[0], "second": tokens[1], "": torch.zeros_like(tokens[0])}
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: encode(model, torch.stack([ids[x] for x in c])))
    torch.manual_seed(16)
    images = text_to_images(model, ["first", "second"], (16, 16), SamplerSettings("ddim", 5, 0.0, 5.0))
    assert_close(images, case.outputs["decoded"].clamp(-1, 1))


def test_devices():
    assert choose_device("cpu") == CPU and choose_device().type in ("cpu", "cuda", "mps")
    for name in ("toaster", "cuda:99", "meta:x", "vulkan"):
        with pytest.raises(UserError, match="--device"):
            choose_device(name)


def test_unknown_words_are_found_once(model):
    assert unknown_words(model, ["rocket zzyx", "zzyx ROCKET"]) == ["zzyx"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "there is no configuration"),
        ("model: [", "cannot read"),
        ("a: 1", "describes no model"),
        ("- 1", "describes no model"),
        ("model: {params: {}}", "describes no model"),
        ("model: {target: a.B, params: {x: '${gone}'}}", "cannot read"),
        ("model: {target: a.B, params: [1]}", "must hold names and values"),
        ("model: {target: a.B, params: 3}", "must hold names and values"),
        ("model: {target: a.B, params: abc}", "must hold names and values"),
        ("\x00", "cannot read"),
    ],
)
def test_a_bad_configuration_is_told(tmp_path, text, match):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=match) as error:
        read_config(path)
    assert "\n" not in str(error.value)


def test_models_are_found(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "models" / "ldm" / "mine"
    write_model(kept)
    assert named_model("mine").checkpoint.name == "model.ckpt" and named_model("mine").name == "mine"
    (kept / "model.safetensors").touch()
    assert named_model("mine").checkpoint.name == "model.safetensors"
    assert named_model(str(folder)).config == folder / "config.yaml"
    assert find_model(ckpt=str(folder / "model.ckpt")).config == folder / "config.yaml"
    assert find_model() is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "mime"}, 'no model "mime".*did you mean "mine".*available:.*mine'),
        ({"name": "hollow"}, "contains no weights"),
        ({"name": "bare"}, r"contains no config\.yaml"),
        ({"name": "mine", "ckpt": "x"}, "leave out"),
        ({"config": "x.yaml"}, "needs --ckpt"),
        ({"ckpt": "x.ckpt"}, "no checkpoint"),
        ({"ckpt": "models/ldm/bare/model.ckpt"}, "--config"),
        ({"ckpt": "models/ldm/bare/model.ckpt", "config": "x.yaml"}, "no configuration"),
    ],
)
def test_a_model_that_cannot_be_found_is_told(tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "hollow", "bare"):
        (tmp_path / "models" / "ldm" / name).mkdir(parents=True)
    for name in ("mine", "bare"):
        (tmp_path / "models" / "ldm" / name / "model.ckpt").touch()
    with pytest.raises(UserError, match=match):
        find_model(**options)


@pytest.mark.parametrize(
    "params",
    [
        {"image_size": "x"},
        {"image_size": [8]},
        {"unet_config": {"params": [1]}},
        {"unet_config": {"params": {"channel_mult": 3}}},
        {"first_stage_config": {"params": {"ddconfig": 3}}},
    ],
    ids=str,
)
def test_sizes_that_are_none_are_told(params):
    with pytest.raises(UserError, match="does not state its size"):
        ImageSize.of({"params": params})


def test_sizes_follow_from_the_configuration(repo_root):
    published = ImageSize.of(read_config(repo_root / "configs/latent-diffusion/txt2img-1p4B-eval.yaml"))
    assert published == ImageSize(256, 256, factor=8, multiple=64)
    assert published.check("--H", 320) == 320
    with pytest.raises(UserError, match=r"--H 100 .*multiple of 64.*nearest: 64 or 128"):
        published.check("--H", 100)
    with pytest.raises(UserError, match=r"nearest: 64$"):
        published.check("--W", 8)


def test_the_tiny_model_heeds_its_prompt(model):
    """Otherwise half of the tests above would compare equal things."""
    noise = torch.randn(1, 3, 8, 8)
    rocket, fox = (text_to_images(model, [p], (8, 8), SamplerSettings(), noise=noise) for p in ("rocket", "fox"))
    assert not torch.allclose(rocket, fox, atol=1e-3)
