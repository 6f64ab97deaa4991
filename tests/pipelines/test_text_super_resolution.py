"""Tests of `ldm.pipelines.text_super_resolution`, and of the recorded upscaling by a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import random_images
from parity_cases import assert_close, build, load_case
from tiny_models import make_model, superresolution_config, write_clip
from tiny_stable_diffusion import stable_diffusion_config, upscaler_config

import ldm
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.pixels import to_batch
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines import sampling
from ldm.pipelines.image import ImagePrompt
from ldm.pipelines.loading import for_inference, skip_init
from ldm.pipelines.super_resolution import default_tile, upscaling_factor
from ldm.pipelines.text_super_resolution import TextSuperResolution

IMAGES = random_images(3, 8, 8)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    pytest.importorskip("transformers")
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def model(vocabulary):
    return make_model(upscaler_config(vocabulary))


def enlarge(model, images, prompts="", **options):
    options = {"steps": 3, "seed": 1, "progress": False, "output_type": "numpy", **options}
    return ldm.super_resolve(model, images, prompts, **options)


def settings_of(model, monkeypatch, *arguments, **options) -> dict:
    """Return what `sample_latents` is called with."""
    seen = {}

    def sample(model, shape, **settings):
        seen.update(settings)
        return torch.zeros(shape)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_latents", sample)
        ldm.super_resolve(model, *arguments, progress=False, **options)
    return seen


def test_recorded_samples_are_reproduced(monkeypatch):
    """The record is the published chain after the noise of the small image; its prompts were token ids."""
    case = load_case("sd_upscaler")
    model, inputs, outputs = build(case), case.inputs, case.outputs
    learned = type(model).get_learned_conditioning
    tokens = {"a": inputs["txt"], "": inputs["uncond_tokens"]}
    monkeypatch.setattr(model, "get_learned_conditioning", lambda texts: learned(model, tokens[texts[0]]))
    monkeypatch.setattr(model.low_scale_model, "forward", lambda *_: (outputs["c_concat"], outputs["c_adm"]))
    pipeline = TextSuperResolution(steps=10, factor=2, timestep_spacing="uniform")
    requests = 2 * [ImagePrompt(random_images(1, 16, 16)[0], "a")]
    with torch.no_grad():
        latent = pipeline.sample(model, requests, SeededNoise([1, 2]), inputs["x_T"])
        assert_close(latent, outputs["latent"])
        assert_close(model.decode_first_stage(latent), outputs["decoded"])


def test_conditioning_is_the_text_the_noisy_image_and_its_level(model, monkeypatch):
    """The first noise of a seed is that of the small image; the start noise follows."""
    seen = settings_of(model, monkeypatch, IMAGES[0], "cat", negative_prompt="dog", seed=7, noise_level=30)
    noise, low = SeededNoise([7])((1, 3, 8, 8)), model.low_scale_model
    noisy = low.q_sample(to_batch(IMAGES[:1]), torch.tensor([30]), noise)
    cond, uncond = seen["cond"], seen["uncond"]
    torch.testing.assert_close(cond["c_concat"][0], noisy)
    assert cond["c_adm"].tolist() == [30] and cond["c_adm"].dtype == torch.int64
    assert uncond["c_concat"] is cond["c_concat"] and uncond["c_adm"] is cond["c_adm"]
    assert torch.equal(cond["c_crossattn"][0], model.get_learned_conditioning(["cat"]))
    assert torch.equal(uncond["c_crossattn"][0], model.get_learned_conditioning(["dog"]))
    start = seen["noise"]((1, 4, 8, 8))
    following = SeededNoise([7])
    following((1, 3, 8, 8))
    assert torch.equal(start, following((1, 4, 8, 8)))


def test_defaults_are_the_published_ones(model, monkeypatch):
    seen = settings_of(model, monkeypatch, IMAGES[0], "cat", seed=7)
    assert {name: seen[name] for name in ("steps", "eta", "scale")} == {"steps": 50, "eta": 0.0, "scale": 9.0}
    assert seen["cond"]["c_adm"].tolist() == [20]
    assert default_tile(ModelInfo.of(model)) == 16 and upscaling_factor(ModelInfo.of(model)) == 2


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (9, 21)])
@pytest.mark.parametrize("tile", [None, 0])
def test_images_of_any_size_are_doubled(model, size, tile):
    (image,) = enlarge(model, random_images(1, *size)[0], "cat", tile=tile)
    assert image.shape == (2 * size[0], 2 * size[1], 3)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm"])
def test_large_images_are_sampled_in_tiles(model, sampler):
    image = random_images(1, 12, 20)[0]
    whole, tiled, again = (enlarge(model, image, "cat", tile=tile, sampler=sampler)[0] for tile in (0, 16, 16))
    assert (tiled == again).all() and (tiled != whole).any()


def test_image_does_not_depend_on_the_batch_size(model):
    runs = [enlarge(model, IMAGES, ["cat", "dog", ""], batch_size=size, eta=1.0) for size in (1, 3)]
    for alone, together in zip(*runs, strict=True):
        assert np.abs(alone.astype(int) - together).max() <= 1
    assert (enlarge(model, IMAGES[1], "dog", seed=2, eta=1.0)[0] != enlarge(model, IMAGES[1], "cat", seed=2)[0]).any()


def test_noise_level_changes_the_image(model):
    none, some, much = (enlarge(model, IMAGES[0], noise_level=level)[0] for level in (0, 20, 350))
    assert (none != some).any() and (some != much).any()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(vocabulary, precision):
    """The tables of the noise stay in float32."""
    model = make_model(upscaler_config(vocabulary))
    (expected,) = enlarge(model, IMAGES[0], "cat", scale=2.0)
    (image,) = enlarge(model, IMAGES[0], "cat", scale=2.0, precision=precision)
    assert model.low_scale_model.sqrt_alphas_cumprod.dtype == torch.float32
    assert np.abs(image.astype(int) - expected).mean() < 8


def test_model_without_noise_adds_none(vocabulary, monkeypatch):
    target = "ldm.modules.diffusionmodules.upscaling.SimpleImageConcat"
    model = make_model(upscaler_config(vocabulary, low_scale_config={"target": target}))
    seen = settings_of(model, monkeypatch, IMAGES[0], "cat", seed=7)
    torch.testing.assert_close(seen["cond"]["c_concat"][0], to_batch(IMAGES[:1]))
    assert seen["cond"]["c_adm"].tolist() == [0]
    with pytest.raises(UserError, match="noise_level 20 is too high for this model; give 0 or less"):
        enlarge(model, IMAGES[0], noise_level=20)


def test_cut_prompts_log_a_warning(model, caplog):
    enlarge(model, IMAGES[:2], "cat " * 80)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith('the prompt "cat cat') and "82 tokens" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 351}, "noise_level 351 is too high for this model; give 350 or less"),
        ({"noise_level": -1}, "noise_level must be a whole number of at least 0, got -1"),
        ({"noise_level": 1.5}, "noise_level must be a whole number of at least 0, got 1.5"),
        ({"negative_prompt": "x", "scale": 1}, "the negative prompt has no effect without guidance"),
    ],
    ids=str,
)
def test_invalid_options_raise_user_error(model, options, message):
    with pytest.raises(UserError, match=message):
        enlarge(model, IMAGES[0], **options)


@pytest.mark.parametrize("options", [{"prompts": "cat"}, {"negative_prompt": "cat"}, {"scale": 3.0}], ids=str)
def test_model_without_a_text_refuses_one(options):
    model = make_model(superresolution_config())
    with pytest.raises(UserError, match='the model "tiny" reads no text; leave out the prompt'):
        enlarge(model, IMAGES[0], **options)
    with pytest.raises(UserError, match='the model "tiny" adds no noise to its images; leave out the noise level'):
        enlarge(model, IMAGES[0], noise_level=20)


def test_models_of_other_tasks_are_refused(model, vocabulary):
    text = make_model(stable_diffusion_config(1, vocabulary))
    with pytest.raises(UserError, match='is conditioned on "txt", not on "LR_image"; choose a super-resolution model'):
        enlarge(text, IMAGES[0])
    message = 'the model "tiny" is conditioned on a small image beside its text; use ldm superres, or choose'
    with pytest.raises(UserError, match=message):
        ldm.image_to_image(model, IMAGES[0], "cat")
    with pytest.raises(UserError, match='the model "tiny" does not enlarge images by a text; choose an upscaler'):
        TextSuperResolution().check(ModelInfo.of(text))


def test_shipped_configuration_suits_the_task(repo_root):
    config = read_config(repo_root / "configs/stable-diffusion/x4-upscaling.yaml")
    info = ModelInfo("m", config)
    assert (upscaling_factor(info), default_tile(info)) == (4, 512)
    TextSuperResolution(factor=4, tile=512, noise_level=350).check(info)
    with torch.device("meta"), skip_init():
        model = instantiate_from_config(for_inference(config))
        maps = {"c_concat": [torch.zeros(2, 3, 32, 32)], "c_adm": torch.zeros(2, dtype=torch.int64)}
        latents = torch.zeros(2, 4, 32, 32)
        cond = {**maps, "c_crossattn": [torch.zeros(2, 77, 1024)]}
        assert model.apply_model(latents, torch.zeros(2), cond).shape == latents.shape
    assert model.downsampling == 4
