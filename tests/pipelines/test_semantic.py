"""Tests of `ldm.pipelines.semantic`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_model, map_config

import ldm
from ldm.config.model_info import ModelInfo
from ldm.errors import UserError
from ldm.pipelines.semantic import SemanticToImage, label_colours

LABELS = np.random.default_rng(0).integers(0, 8, (3, 16, 16))
OPTIONS = {"steps": 2, "seed": 1, "progress": False, "output_type": "numpy"}


@pytest.fixture(scope="module")
def model():
    return make_model(map_config(8))


def sample(model, maps, **options):
    return ldm.semantic_to_image(model, maps, **OPTIONS, **options)


def test_maps_of_every_type_sample_the_same_image(model):
    expected = sample(model, LABELS[0])[0]
    assert expected.shape == (16, 16, 3)
    image = Image.fromarray(LABELS[0].astype(np.uint8))
    for each in (LABELS[:1], [LABELS[0]], torch.from_numpy(LABELS[0]), torch.from_numpy(LABELS[:1]), image, [image]):
        assert (sample(model, each)[0] == expected).all()


def test_batches_of_maps(model):
    images = sample(model, LABELS, batch_size=1)
    assert len(images) == 3
    for i, image in enumerate(images):
        (alone,) = ldm.semantic_to_image(model, LABELS[i], **{**OPTIONS, "seed": 1 + i})
        assert (alone == image).all()


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (10, 23)), ({"height": 20}, (20, 46)), ({"width": 12}, (5, 12)), ({"height": 9, "width": 30}, (9, 30))],
)
def test_images_have_the_size_of_their_maps_or_that_of_the_options(model, options, size):
    labels = np.random.default_rng(0).integers(0, 8, (10, 23))
    assert sample(model, labels, **options)[0].shape == (*size, 3)


@pytest.mark.parametrize("label", [-1, 8, 255])
def test_label_outside_the_range_of_the_model_raises_user_error(model, label):
    labels = LABELS.copy()
    labels[1, 2, 3] = label
    with pytest.raises(UserError, match=f"label map 1 has the label {label}; this model has 8, from 0 to 7"):
        sample(model, labels)


def test_other_maps_raise_value_error(model):
    for maps in (np.zeros((1, 4, 4, 3), np.uint8), LABELS[0].astype(float)):
        with pytest.raises(ValueError, match="a label map has integer values of the shape"):
            sample(model, maps)


def test_recorded_number_of_labels_must_be_that_of_the_model(model):
    with pytest.raises(UserError, match='the model "tiny" has 8 labels, not 182'):
        SemanticToImage(labels=182).check(ModelInfo.of(model))


def test_colours_are_those_of_the_palette_or_fixed_random_ones():
    colours = label_colours(8, {"#87ceeb": 3, "#102030": 9})
    assert colours.shape == (8, 3) and colours.dtype == np.uint8
    assert colours[3].tolist() == [0x87, 0xCE, 0xEB]
    assert (np.delete(colours, 3, 0) == np.delete(label_colours(8, None), 3, 0)).all()
