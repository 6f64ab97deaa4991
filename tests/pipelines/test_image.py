"""Tests of `ldm.pipelines.image`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import random_images
from parity_cases import assert_close, build, load_case
from PIL import Image, ImageOps
from tiny_models import make_model, text_config, write_clip
from tiny_stable_diffusion import stable_diffusion_config

import ldm
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.io.pixels import to_batch, to_uint8
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines import sampling
from ldm.pipelines.image import ImagePrompt, ImageToImage, start_settings
from ldm.pipelines.sampling import decode, encode

IMAGES = random_images(3, 16, 16)


@pytest.fixture(scope="module")
def model():
    return make_model(text_config())


def sample(model, images, prompts="", **options):
    options = {"steps": 4, "seed": 1, "progress": False, "output_type": "numpy", **options}
    return ldm.image_to_image(model, images, prompts, **options)


def test_images_of_every_type_sample_the_same_image(model):
    expected = sample(model, IMAGES[0], "fox")[0]
    for image in (
        Image.fromarray(IMAGES[0]),
        IMAGES[:1],
        [IMAGES[0]],
        torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2),
    ):
        assert (sample(model, image, "fox")[0] == expected).all()
    floats = (IMAGES[0] / 127.5 - 1).astype(np.float32)
    assert (sample(model, floats, ["fox"])[0] == expected).all()


def test_prompts_are_one_for_all_or_one_for_each(model):
    together = sample(model, IMAGES, ["fox", "rocket", "red heart"], batch_size=1)
    for i, prompt in enumerate(("fox", "rocket", "red heart")):
        alone = sample(model, IMAGES[i], prompt, seed=1 + i)[0]
        assert np.abs(alone.astype(int) - together[i]).max() <= 1, "up to rounding: a longer run is packed"
    assert len(sample(model, IMAGES, "fox")) == 3
    assert len(sample(model, IMAGES[0], ["fox", "rocket"])) == 2, "one image with several prompts"
    with pytest.raises(ValueError, match="3 images and 2 prompts do not match; give one for each, or one for all"):
        sample(model, IMAGES, ["fox", "rocket"])


def test_cut_prompts_log_a_warning(model, caplog):
    sample(model, IMAGES, "fox " * 15, negative_prompt="Rocket " * 16)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith('the prompt "fox fox') and "17 tokens" in first and first.endswith('cut: "… fox"')
    assert second.startswith('the negative prompt "Rocket') and second.endswith('cut: "… Rocket Rocket"')


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (18, 21)), ({"height": 24}, (24, 28)), ({"width": 7}, (6, 7)), ({"height": 8, "width": 30}, (8, 30))],
)
def test_sizes(model, options, size):
    (image,) = sample(model, random_images(1, 18, 21), **options)
    assert image.shape == (*size, 3)


def test_images_are_cropped_to_the_proportions():
    image = random_images(1, 18, 21)[0]
    pipeline = ImageToImage(height=8, width=8)
    expected = ImageOps.fit(Image.fromarray(image), (8, 8), Image.Resampling.LANCZOS)
    assert (pipeline.fit(image) == np.asarray(expected)).all()
    assert ImageToImage().fit(image) is image


def test_images_of_several_sizes(model):
    images = [random_images(1, *size)[0] for size in ((16, 16), (8, 12), (16, 16))]
    sampled = sample(model, images, "fox")
    assert [each.shape for each in sampled] == [(16, 16, 3), (8, 12, 3), (16, 16, 3)]
    assert (sample(model, images[1], "fox", seed=2)[0] == sampled[1]).all()


def test_low_strength_is_near_the_reconstruction_and_full_strength_is_not(model):
    copy = to_uint8(decode(model, encode(model, to_batch([IMAGES[0]]))))[0].astype(int)
    distances = [
        np.abs(sample(model, IMAGES[0], scale=1.0, steps=6, strength=strength)[0] - copy).mean()
        for strength in (1e-6, 0.5, 1)
    ]
    assert distances[0] < distances[1] < distances[2]


def test_strength_is_the_share_of_the_steps(model):
    calls = []
    sample(model, IMAGES[0], steps=10, strength=0.3, callback=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert ImageToImage(steps=10, strength=0.7).count_steps(ImagePrompt(IMAGES[0]), 1000) == 7


def test_start_latents_noise_the_image(model):
    """They replace the noise of the seed, not the image."""
    noise = SeededNoise([1])((1, 3, 8, 8))
    for strength in (0.25, 0.75):
        given = sample(model, IMAGES[0], "fox", strength=strength, latents=noise, seed=8)[0]
        assert (given == sample(model, IMAGES[0], "fox", strength=strength, seed=1)[0]).all()
        assert (given != sample(model, IMAGES[1], "fox", strength=strength, latents=noise)[0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"strength": float("nan")}, "strength must be above 0 and at most 1, got nan"),
        ({"sampler": "ddpm"}, 'the sampler "ddpm" takes every timestep; choose another one'),
        ({"negative_prompt": "x", "scale": 1}, "the negative prompt has no effect without guidance"),
    ],
    ids=str,
)
def test_invalid_options_raise_user_error(model, options, message):
    with pytest.raises(UserError, match=message):
        sample(model, IMAGES[0], **options)


# -- Stable Diffusion ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """Return models in the structure of Stable Diffusion 1 and 2, by their version; they have 100 timesteps."""
    pytest.importorskip("transformers")
    vocabulary = write_clip(tmp_path_factory.mktemp("clip"))
    return {version: make_model(stable_diffusion_config(version, vocabulary)) for version in (1, 2)}


def settings_of(model, monkeypatch, **options) -> dict:
    """Return what `sample_latents` is called with."""
    seen = {}

    def sample_latents(model, shape, **settings):
        seen.update(settings)
        return torch.zeros(shape)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sample_latents", sample_latents)
        ldm.image_to_image(model, IMAGES[0], "cat", progress=False, **options)
    return seen


def test_recorded_image_to_image_is_reproduced(monkeypatch):
    """The record is the published chain, from the image to pixels; its prompts were token ids."""
    case = load_case("sd1_img2img")
    model, inputs, outputs = build(case), case.inputs, case.outputs
    learned = type(model).get_learned_conditioning
    tokens = {"a": inputs["tokens"], "": inputs["uncond_tokens"]}
    monkeypatch.setattr(model, "get_learned_conditioning", lambda texts: learned(model, tokens[texts[0]]))

    def sampled_latents(model, _):
        torch.manual_seed(42)
        return model.get_first_stage_encoding(model.encode_first_stage(inputs["image"]))

    monkeypatch.setattr(sampling, "encode", sampled_latents)
    settings = {"steps": 10, "scale": 5.0, "strength": 0.75}
    pipeline = ImageToImage(**{**settings, **start_settings(ModelInfo.of(model), settings)})
    requests = 2 * [ImagePrompt(random_images(1, 32, 32)[0], "a")]
    steps = []
    with torch.no_grad():
        latent = pipeline.sample(model, requests, torch.randn, on_step=lambda: steps.append(1))
        assert_close(latent, outputs["latent"])
        assert_close(model.decode_first_stage(latent), outputs["decoded"])
    assert len(steps) == 7


@pytest.mark.parametrize(("version", "scale"), [(1, 5.0), (2, 9.0)])
def test_default_guidance_scale_follows_from_the_model(stable, monkeypatch, version, scale):
    assert settings_of(stable[version], monkeypatch)["scale"] == scale
    assert settings_of(stable[version], monkeypatch, scale=2)["scale"] == 2


@pytest.mark.parametrize(("strength", "count"), [(0.75, 7), (0.79, 7), (0.29, 2), (1.0, 10), (0.05, 1)])
def test_strength_is_rounded_down_to_steps_as_published(stable, strength, count):
    calls = []
    options = {"steps": 10, "strength": strength, "callback": lambda *call: calls.append(call)}
    sample(stable[1], IMAGES[0], "cat", **options)
    assert calls == [(i + 1, count) for i in range(count)]


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize(("strength", "timestep"), [(0.5, 51), (0.05, 11), (1.0, 99)])
def test_image_is_noised_to_the_timestep_after_those_that_are_sampled(stable, monkeypatch, sampler, strength, timestep):
    """The even grid of ten steps is 1, 11, …, 91; the timestep after its end is the last of the model."""
    model, seen = stable[1], []
    run = DDIMSampler.run
    with monkeypatch.context() as patch:
        patch.setattr(DDIMSampler, "run", lambda self, *args: seen.append(args) or run(self, *args))
        sample(model, IMAGES[0], "cat", steps=10, strength=strength, sampler=sampler, seed=3)
    ((_, grid, _, _, start, index),) = seen
    assert grid.tolist() == list(range(1, 100, 10)) and index == max(round(10 * strength), 1) - 1
    x0, noise = encode(model, to_batch(IMAGES[:1])), SeededNoise([3])((1, 4, 8, 8))
    torch.testing.assert_close(start, model.q_sample(x0, torch.tensor([timestep]), noise))


def test_published_start_applies_to_even_grids_of_stable_diffusion(stable):
    info, other = ModelInfo.of(stable[1]), ModelInfo("m", text_config())
    uniform = {"published_start": True, "timestep_spacing": "uniform"}
    assert start_settings(info, {"steps": 10}) == uniform
    assert start_settings(info, {"steps": 7}) == uniform, "the published grid of 7 has 8 timesteps"
    exact = {"published_start": True, "timestep_spacing": "exact"}
    assert start_settings(info, {"steps": 10, "timestep_spacing": "exact"}) == exact
    assert start_settings(info, {"steps": 33}) == exact, "the published grid of 33 exceeds the last timestep"
    assert start_settings(info, {"steps": 101}) == exact, "the error comes later"
    assert start_settings(info, {"steps": 10, "timestep_spacing": "trailing"}) == {}
    assert start_settings(info, {"steps": 10, "sampler": "dpm"}) == {}
    assert start_settings(other, {"steps": 10}) == {}
    trailing = stable_diffusion_config(1, timestep_spacing="trailing")
    assert start_settings(ModelInfo("m", trailing), {"steps": 10}) == {}


def test_settings_without_a_start_are_those_of_the_share():
    assert not ImageToImage.from_settings({"sampler": "ddim", "steps": 2, "eta": 0.0, "scale": 1.0}).published_start


def test_images_of_stable_diffusion_do_not_depend_on_the_batch_size(stable):
    runs = [sample(stable[2], IMAGES, "cat", batch_size=size, steps=10, eta=1.0) for size in (1, 3)]
    for alone, together in zip(*runs, strict=True):
        assert np.abs(alone.astype(int) - together).max() <= 1
