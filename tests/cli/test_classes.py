"""The classes of a model, and how users give them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import class_config, pixel_config, randomise, text_config, unconditional_config

from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.errors import UserError
from ldm.tasks.classes import Classes, class_conditioning

IMAGENET = Classes("cin", 1000, True)
DRAWINGS = Classes("emoji64", 1366, True)
NUMBERS = Classes("mine", 10, False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (class_config(11), (11, False)),
        (class_config(11, cond_dropout=0.1), (10, True)),
        (class_config(1001), (1000, True)),
        (class_config(1000), (1000, False)),
        (class_config(1367), (1366, True)),
        (class_config(1, cond_dropout=0.1), (1, False)),
        (text_config(), (1366, True)),
    ],
)
def test_how_many_classes_a_model_has_and_whether_one_is_none(config, expected):
    classes = Classes.of("x", config)
    assert (classes.count, classes.guidable) == expected


def test_labels_embedded_by_the_network_count_too():
    config = class_config(cond_stage_config={"target": "ldm.modules.encoders.modules.IdentityEncoder"})
    config["params"]["unet_config"]["params"]["num_classes"] = 7
    assert Classes.of("x", config).count == 7


@pytest.mark.parametrize("config", [unconditional_config(), pixel_config()])
def test_a_model_may_have_none(config):
    assert Classes.of("x", config) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("configs/latent-diffusion/cin256-v2.yaml", (1000, True)),
        ("models/ldm/cin256/config.yaml", (1000, False)),
        ("configs/latent-diffusion/cin-ldm-vq-f8.yaml", (1000, False)),
        ("models/ldm/emoji64/config.yaml", (1366, True)),
        ("models/ldm/celeba256/config.yaml", None),
        ("models/ldm/ffhq256/config.yaml", None),
        ("models/ldm/lsun_beds256/config.yaml", None),
        ("models/ldm/lsun_churches256/config.yaml", None),
    ],
)
def test_the_published_models(repo_root, path, expected):
    classes = Classes.of("x", read_config(repo_root / path))
    assert (classes and (classes.count, classes.guidable)) == expected


@pytest.mark.parametrize("path", ["configs/latent-diffusion/txt2img-1p4B-eval.yaml", "models/ldm/bsr_sr/config.yaml"])
def test_other_models_are_refused(repo_root, path):
    with pytest.raises(UserError, match="choose a class-conditional model"):
        Classes.of("x", read_config(repo_root / path))


@pytest.mark.parametrize(
    ("classes", "words", "labels"),
    [
        (IMAGENET, ["25", "187", "448", "992"], [25, 187, 448, 992]),
        (IMAGENET, ["european fire salamander", "Yorkshire Terrier", "BIRDHOUSE", "agaric"], [25, 187, 448, 992]),
        (IMAGENET, ["yorkshire", "fire  salamander"], [187, 25]),
        (IMAGENET, ["0-2,999", "7"], [0, 1, 2, 999, 7]),
        (IMAGENET, ["goldfish, 3 ,tench,"], [1, 3, 0]),
        (DRAWINGS, ["red heart", "HEAVY  black heart"], [150, 150]),
        (DRAWINGS, ["grinning face with smiling eyes"], [843]),
        (DRAWINGS, ["1st place medal"], [1093]),
        (NUMBERS, ["3", "0-1"], [3, 0, 1]),
    ],
)
def test_classes_are_given_by_name_number_range_and_list(classes, words, labels):
    assert classes.parse(words) == labels


@pytest.mark.parametrize(
    ("classes", "word", "message"),
    [
        (IMAGENET, "gold fish", 'there is no class "gold fish" (did you mean "goldfish"?)'),
        (IMAGENET, "salamander", "may be European fire salamander (25), spotted salamander (28); give a whole name"),
        (IMAGENET, "terrier", "and 1"),
        (IMAGENET, "1000", "are 0 to 999"),
        (IMAGENET, "5-3", "from the smaller number to the larger"),
        (IMAGENET, ",", "no class is named"),
        (IMAGENET, 5000 * "9", "are 0 to 999"),
        (DRAWINGS, "-1", "are 0 to 1365"),
        (IMAGENET, "0-99999999999999999999", "are 0 to 999"),
        (IMAGENET, "", "there is no class"),
        (IMAGENET, "-1", "are 0 to 999"),
        (IMAGENET, "1.5", "there is no class"),
        (NUMBERS, "fox", "has no names; give numbers, 0 to 9"),
        (NUMBERS, "10", "are 0 to 9"),
    ],
)
def test_what_is_no_class_is_one_line(classes, word, message):
    with pytest.raises(UserError) as raised:
        classes.parse([word])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_classes_are_called_something():
    assert IMAGENET.inputs(25) == {"class_label": 25, "class": "European fire salamander"}
    assert NUMBERS.inputs(3) == {"class_label": 3, "class": "3"}


def test_guidance_needs_a_class_that_stands_for_none():
    IMAGENET.check_scale(3)
    NUMBERS.check_scale(1)
    with pytest.raises(UserError, match="no null class"):
        NUMBERS.check_scale(3)


def test_the_network_is_told_the_class_and_led_away_from_the_last(seed):
    model = randomise(instantiate_from_config(class_config(11))).eval()
    table = model.cond_stage_model.embedding.weight
    told, empty = class_conditioning(model, [NUMBERS.inputs(3), NUMBERS.inputs(0)])
    assert torch.equal(told, table[[3, 0]][:, None]) and torch.equal(empty, table[[10, 10]][:, None])
    assert class_conditioning(model, [NUMBERS.inputs(3)], guided=False)[1] is None
    assert class_conditioning(model, [{}]) == (None, None)


def test_a_text_model_is_told_the_name(seed):
    model = randomise(instantiate_from_config(text_config())).eval()
    with torch.no_grad():
        told, empty = class_conditioning(model, [{"class_label": 1, "class": "red heart"}])
        assert torch.equal(told, model.get_learned_conditioning(["red heart"]))
        assert torch.equal(empty, model.get_learned_conditioning([""]))
