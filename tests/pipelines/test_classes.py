"""Tests of `ldm.pipelines.classes`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import class_config, make_model, randomise, text_config, unconditional_config

import ldm
from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.pipelines.classes import ClassRequest, class_conditioning

OPTIONS = {"steps": 2, "seed": 1, "progress": False, "output_type": "numpy"}


@pytest.fixture(scope="module")
def model():
    return make_model(class_config(4, class_names=["cat", "dog", "red fox"]))


def test_conditioning_is_the_class_and_the_null_class(seed):
    model = randomise(instantiate_from_config(class_config(11))).eval()
    table = model.cond_stage_model.embedding.weight
    cond, uncond = class_conditioning(model, [ClassRequest(3, "3"), ClassRequest(0, "0")])
    assert torch.equal(cond, table[[3, 0]][:, None]) and torch.equal(uncond, table[[10, 10]][:, None])
    assert class_conditioning(model, [ClassRequest(3, "3")], guided=False)[1] is None
    assert class_conditioning(model, [None]) == (None, None)


def test_text_model_is_conditioned_on_the_name(seed):
    model = randomise(instantiate_from_config(text_config())).eval()
    with torch.no_grad():
        cond, uncond = class_conditioning(model, [ClassRequest(1, "red heart")])
        assert torch.equal(cond, model.get_learned_conditioning(["red heart"]))
        assert torch.equal(uncond, model.get_learned_conditioning([""]))


@pytest.mark.parametrize(
    ("classes", "labels"),
    [(1, [1]), ("dog", [1]), ("fox", [2]), ("0-2", [0, 1, 2]), (["cat", 2, "1"], [0, 2, 1]), ((0, 0), [0, 0])],
    ids=str,
)
def test_classes_are_names_labels_and_ranges(model, classes, labels):
    images = ldm.class_to_image(model, classes, batch_size=1, **OPTIONS)
    expected = ldm.class_to_image(model, labels, batch_size=1, **OPTIONS)
    assert len(images) == len(labels)
    assert all((a == b).all() for a, b in zip(images, expected, strict=True))


def test_class_changes_the_image(model):
    cat, dog = (ldm.class_to_image(model, name, **OPTIONS)[0] for name in ("cat", "dog"))
    assert (cat != dog).any()


def test_text_model_with_class_names_equals_its_prompts():
    model = make_model(text_config(class_names=["red heart", "fox"]))
    by_class = ldm.class_to_image(model, ["fox", 0], scale=2.0, **OPTIONS)
    by_text = ldm.text_to_image(model, ["fox", "red heart"], scale=2.0, **OPTIONS)
    assert all((a == b).all() for a, b in zip(by_class, by_text, strict=True))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("wolf", 'there is no class "wolf"'),
        (3, 'class "3": the classes of "tiny" are 0 to 2'),
        ([], "no class is named; give names or numbers"),
        ("2-0", "a range goes from the smaller number to the larger"),
    ],
)
def test_unknown_class_raises_user_error(model, classes, message):
    with pytest.raises(UserError, match=message):
        ldm.class_to_image(model, classes, **OPTIONS)


def test_guidance_needs_a_null_class():
    model = make_model(class_config(3))
    assert len(ldm.class_to_image(model, 0, scale=1, **OPTIONS)) == 1
    with pytest.raises(UserError, match='the model "tiny" has no null class, which guidance needs; use scale 1'):
        ldm.class_to_image(model, 0, scale=2, **OPTIONS)


def test_unconditional_model_has_no_classes(model):
    unconditional = make_model(unconditional_config())
    with pytest.raises(UserError, match=r'the model "tiny" has no classes; use ldm\.unconditional'):
        ldm.class_to_image(unconditional, 0, **OPTIONS)
    with pytest.raises(
        UserError, match='the model "tiny" is conditioned on "class_label"; choose an unconditional model'
    ):
        ldm.unconditional(model, **OPTIONS)
    assert len(ldm.unconditional(unconditional, 5, **OPTIONS)) == 5
    assert np.asarray(ldm.unconditional(unconditional, **OPTIONS)).shape == (1, 16, 16, 3)
