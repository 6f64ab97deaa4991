"""Tests of `ldm.pipelines.image`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import random_images
from PIL import Image, ImageOps
from tiny_models import make_model, text_config

import ldm
from ldm.errors import UserError
from ldm.io.pixels import to_batch, to_uint8
from ldm.models.diffusion.noise import SeededNoise
from ldm.pipelines.image import ImagePrompt, ImageToImage
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
