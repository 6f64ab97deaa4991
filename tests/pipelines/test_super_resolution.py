"""Tests of `ldm.pipelines.super_resolution`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from library_tasks import random_images
from PIL import Image
from tiny_models import make_model, superresolution_config

import ldm
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.super_resolution import SuperResolution, default_tile, upscaling_factor

IMAGES = random_images(3, 8, 8)


@pytest.fixture(scope="module")
def model():
    return make_model(superresolution_config())


def enlarge(model, images, **options):
    options = {"steps": 3, "seed": 1, "progress": False, "output_type": "numpy", **options}
    return ldm.super_resolve(model, images, **options)


def test_factor_is_that_of_the_model():
    def info(stage):
        config = superresolution_config()
        return ModelInfo("m", config | {"params": config["params"] | {"cond_stage_config": stage}})

    unshuffle = {"target": "torch.nn.PixelUnshuffle", "params": {"downscale_factor": 2}}
    assert upscaling_factor(info({"target": "torch.nn.Identity"})) == 2
    assert upscaling_factor(info(unshuffle)) == 1
    with pytest.raises(UserError, match='encodes small images with "__is_first_stage__", so its upscaling factor is'):
        upscaling_factor(info("__is_first_stage__"))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (9, 21)])
@pytest.mark.parametrize("tile", [None, 0, 8])
def test_images_of_any_size_are_doubled(model, size, tile):
    (image,) = enlarge(model, random_images(1, *size), tile=tile)
    assert image.shape == (2 * size[0], 2 * size[1], 3)


def test_images_of_every_type_give_the_same_image(model):
    expected = enlarge(model, IMAGES[0])[0]
    floats = (IMAGES[0] / 127.5 - 1).astype(np.float32)
    for image in (Image.fromarray(IMAGES[0]), IMAGES[:1], floats, torch.from_numpy(floats).permute(2, 0, 1)[None]):
        assert (enlarge(model, image)[0] == expected).all()


def test_default_tile_is_the_size_that_the_model_was_trained_on(model):
    assert default_tile(ModelInfo.of(model)) == 16
    large = random_images(1, 16, 24)
    default, same, whole = (enlarge(model, large, tile=tile)[0] for tile in (None, 16, 0))
    assert (default == same).all() and (default != whole).any()


def test_eta_defaults_to_1_for_ddim_and_to_0_for_other_samplers(model):
    default, noisy, plain = (enlarge(model, IMAGES[0], **options)[0] for options in ({}, {"eta": 1.0}, {"eta": 0.0}))
    assert (default == noisy).all() and (default != plain).any()
    assert len(enlarge(model, IMAGES[0], sampler="dpm")) == 1
    with pytest.raises(UserError, match='the sampler "dpm" is deterministic; eta must be 0, got 1'):
        enlarge(model, IMAGES[0], sampler="dpm", eta=1.0)


def test_recorded_factor_must_be_that_of_the_model(model):
    with pytest.raises(UserError, match='the model "tiny" enlarges 2 times, not 4 times'):
        SuperResolution(factor=4).check(ModelInfo.of(model))


@pytest.mark.parametrize(("tile", "message"), [(9, "tile 9 is not a multiple of 4"), (4, "tile 4 is too small")])
def test_tiles_that_do_not_suit_the_model_raise_user_error(model, tile, message):
    with pytest.raises(UserError, match=message):
        enlarge(model, IMAGES[0], tile=tile)
