"""Tests of `ldm.pipelines.layout`."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import layout_config, make_model

import ldm
from ldm.errors import UserError
from ldm.pipelines.layout import LabelledBox, Layout, as_layout, layout_tokens

DOG = {"label": "Dog", "box": [0.25, 0.5, 1.0, 1.0]}
OPTIONS = {"steps": 2, "seed": 1, "progress": False, "output_type": "numpy"}


@pytest.fixture(scope="module")
def model():
    return make_model(layout_config(class_names=["Tortoise", "Dog", "Cat"]))


def sample(model, layouts, **options):
    return ldm.layout_to_image(model, layouts, **OPTIONS, **options)


def test_layouts_of_every_form_sample_the_same_image(model):
    expected = sample(model, {"boxes": [DOG]})[0]
    number = {"label": 1, "box": DOG["box"]}
    pixels = {"size": [200, 100], "boxes": [{"label": "dog", "box": [50, 50, 200, 100]}]}
    layout = Layout((LabelledBox(1, (0.25, 0.5, 1.0, 1.0)),))
    for each in ([{"boxes": [DOG]}], {"boxes": [number]}, pixels, layout, [layout]):
        assert (sample(model, each)[0] == expected).all()
    assert as_layout({"boxes": [DOG]}, ["Tortoise", "Dog"]).boxes[0] == LabelledBox(1, (0.25, 0.5, 1.0, 1.0), "Dog")


def test_boxes_change_the_image(model):
    images = sample(
        model, [{"boxes": [DOG]}, {"boxes": [{**DOG, "label": "Cat"}]}, {"boxes": [DOG, DOG]}], batch_size=1
    )
    same_seed = [sample(model, {"boxes": [{**DOG, "label": label}]})[0] for label in ("Dog", "Cat")]
    assert len(images) == 3 and (same_seed[0] != same_seed[1]).any()


def test_class_names_may_be_in_a_file(tmp_path, model):
    (tmp_path / "names.txt").write_text("Tortoise\nDog\n")
    named = make_model(layout_config(class_names=str(tmp_path / "names.txt")))
    assert (sample(named, {"boxes": [DOG]})[0] == sample(model, {"boxes": [DOG]})[0]).all()


def test_tokens_are_those_of_the_boxes():
    tokens = layout_tokens(Layout((LabelledBox(1, (0.25, 0.5, 1.0, 1.0)),)), 8192, 92)
    assert tokens.dtype == torch.int64 and tokens[:3].tolist() == [1, 90 * 44 + 22, 90 * 89 + 89]


def test_guidance_uses_the_empty_layout(model, monkeypatch, caplog):
    seen = []
    encode = model.get_learned_conditioning
    monkeypatch.setattr(model, "get_learned_conditioning", lambda tokens: (seen.append(tokens), encode(tokens))[1])
    sample(model, {"boxes": [DOG]}, scale=2.0)
    assert len(seen) == 2 and seen[1].unique().tolist() == [299]
    assert "not trained for guidance" in caplog.text


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"boxes": []}, "the layout has no box"),
        ({"boxes": [{"label": "Dgo", "box": [0, 0, 1, 1]}]}, r'there is no such class \(did you mean "Dog"'),
        ({"boxes": [{"label": 299, "box": [0, 0, 1, 1]}]}, "classes go from 0 to 298"),
        ({"boxes": 4 * [DOG]}, "give at most 3"),
        ({"boxes": 3 * [DOG] + [{**DOG, "label": "Cat"}, DOG]}, r'give at most 3 \(too many: "Cat", "Dog"\)'),
        ({"boxes": [{"label": 1, "box": [0, 0, 2, 1]}]}, "extends outside"),
    ],
)
def test_invalid_layout_raises_user_error_before_sampling(model, monkeypatch, layout, message):
    monkeypatch.setattr(model, "apply_model", None)
    with pytest.raises(UserError, match=message):
        sample(model, [{"boxes": [DOG]}, layout])


def test_layouts_are_plain_json(model):
    layout = json.loads(json.dumps({"boxes": [DOG]}))
    assert (sample(model, layout)[0] == sample(model, {"boxes": [DOG]})[0]).all()
