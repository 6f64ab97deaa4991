"""Check of batches, for every kind of model."""

import logging
import types

import pytest
import torch
from tiny_models import (
    class_config,
    inpainting_config,
    layout_config,
    map_config,
    pixel_config,
    superresolution_config,
    text_config,
)

from ldm.config.instantiate import instantiate_from_config
from ldm.errors import UserError
from ldm.models.diffusion.classifier import NoisyLatentImageClassifier
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.batch_check import BatchCheck

NAME = "data.params.train"


def images(*shape, low=-1.0, high=1.0):
    """Return float images of a shape, by default (2, 16, 16, 3), whose extremes are `low` and `high`."""
    return torch.linspace(low, high, 2 * 16 * 16 * 3).reshape(shape or (2, 16, 16, 3))


@pytest.fixture(scope="module")
def models():
    """Return one model of each kind, and a batch that it accepts."""
    mask = torch.tensor([-1.0, 1.0]).repeat(2, 16, 8)[..., None]
    rows = {
        "text": (text_config(), {"caption": ["a cat", "a dog"]}),
        "class": (class_config(11), {"class_label": torch.tensor([0, 9])}),
        "layout": (layout_config(), {"coordinates_bbox": torch.full((2, 11), 299)}),
        "semantic": (map_config(182), {"segmentation": torch.zeros(2, 16, 16, 182)}),
        "inpainting": (inpainting_config(), {"masked_image": images(), "mask": mask}),
        "superresolution": (superresolution_config(), {"LR_image": images()[:, :8, :8]}),
        "pixels": (pixel_config(), {}),
    }
    built = {name: (instantiate_from_config(config), entries) for name, (config, entries) in rows.items()}
    built["first stage"] = built["text"][0].first_stage_model, {}
    for name, key, target in (
        ("classifier", "class_label", torch.tensor([0, 4])),
        ("segmenter", "segmentation", torch.zeros(2, 16, 16).long()),
    ):
        classifier = NoisyLatentImageClassifier.__new__(NoisyLatentImageClassifier)
        torch.nn.Module.__init__(classifier)
        classifier.diffusion_model, classifier.label_key, classifier.num_classes = built["text"][0], key, 5
        built[name] = classifier, {key: target}
    return built


@pytest.fixture
def check(models, caplog):
    """Return `check(kind, **changes)`, which checks a batch and returns the message of an error, or the warnings."""

    def run(kind, *, without=(), batch=None, **changes):
        model, entries = models[kind]
        entries = {"image": images(), **entries, **changes} if batch is None else batch
        if batch is None:
            entries = {key: value for key, value in entries.items() if key not in without}
        caplog.clear()
        try:
            with caplog.at_level(logging.WARNING, "ldm"):
                BatchCheck(model)(entries, NAME)
        except UserError as error:
            assert "\n" not in str(error)
            return str(error).removeprefix(f"{NAME}: ").removeprefix(f"{NAME} ")
        return [record.getMessage().removeprefix(f"{NAME}: ") for record in caplog.records]

    return run


KINDS = (
    *("text", "class", "layout", "semantic", "inpainting", "superresolution", "pixels"),
    *("first stage", "classifier", "segmenter"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_suitable_batch_is_accepted(kind, check):
    assert check(kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_missing_entry_names_those_that_exist(kind, check):
    assert check(kind, without=["image"], imgae=images()).startswith('returns no "image" (did you mean "imgae"?), the ')


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("text", "caption"),
        ("class", "class_label"),
        ("layout", "coordinates_bbox"),
        ("semantic", "segmentation"),
        ("inpainting", "masked_image"),
        ("inpainting", "mask"),
        ("superresolution", "LR_image"),
        ("classifier", "class_label"),
    ],
)
def test_missing_conditioning_names_the_parameter_of_the_model(kind, key, check):
    role = {"mask": 'mask of "masked_image"'}.get(key, "cond_stage_key of the model")
    role = "label_key of the model" if kind == "classifier" else role
    message = check(kind, without=[key])
    assert message.startswith(f'returns no "{key}"') and f"the {role}; it returns image" in message


def test_keys_that_are_not_texts_do_not_break_the_message(check):
    assert check("text", batch={1: images()}) == (
        'returns no "image", the first_stage_key of the model; it returns no named entries'
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            [images(), torch.tensor([1, 2])],
            "returns tuples or lists (a batch of a tensor (2, 16, 16, 3) of float32, a tensor (2,) of int64); "
            'return a dictionary {"image": …, "caption": …} for each item',
        ),
        (
            images(),
            "returns no dictionaries (a batch is a tensor (2, 16, 16, 3) of float32); "
            'return {"image": …, "caption": …} for each item',
        ),
        (None, "returns no dictionaries (a batch is None)"),
    ],
)
def test_batch_that_is_not_a_dictionary(batch, message, models):
    with pytest.raises(UserError) as error:
        BatchCheck(models["text"][0])(batch, NAME)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["text", "first stage", "pixels", "classifier"])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            images(2, 3, 16, 16),
            "channels first; return (H, W, C), e.g. np.moveaxis(image, 0, -1)",
        ),
        (images()[..., 0], '(2, 16, 16) in a batch; return an array (H, W, 3), e.g. with image.convert("RGB")'),
        (
            torch.zeros(2, 16, 16, 4),
            "(2, 16, 16, 4) in a batch; return an array (H, W, 3), e.g. with image.",
        ),
        (torch.zeros(2, 3), "(2, 3) in a batch; return an array (H, W, 3) for each item"),
        (images().to(torch.uint8), "of uint8; return float32, in [-1, 1], e.g. image.astype(np.float32) / 127.5 - 1"),
        (images().bool(), "of bool; return float32"),
        (images(low=0, high=255), "has values from 0 to 255; return values in [-1, 1], e.g. image / 127.5 - 1"),
        (["a.png", "b.png"], "is a text in an item; return an array (H, W, 3)"),
        ([[images()], [images()]], "is a list of 1 in an item; return an array (H, W, 3)"),
    ],
    ids=["channels first", "grey", "alpha", "vectors", "uint8", "bool", "0 to 255", "names", "lists"],
)
def test_unsuitable_image(kind, image, message, check):
    assert message in check(kind, image=image)


@pytest.mark.parametrize(
    ("image", "warning"),
    [
        (
            images(low=0, high=1),
            '"image" has values from 0 to 1, not in [-1, 1]; if 0 means black, return 2 * image - 1',
        ),
        (images(low=-2.1, high=2.6), '"image" has values from -2.1 to 2.6, not in [-1, 1]; check the normalization'),
    ],
)
def test_doubtful_image_is_a_warning(image, warning, check):
    assert check("text", image=image) == [warning]


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_constant_and_non_finite_images_are_left_to_others(value, check):
    assert check("text", image=torch.full((2, 16, 16, 3), value)) == []


def test_image_with_overshoot_or_half_precision_is_accepted(check):
    assert check("text", image=images(low=-1.2, high=1.2)) == []
    assert check("text", image=images().half()) == check("text", image=images().double()) == []


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (["a", None], '"caption" is None in an item; return a text, e.g. ""'),
        ([("a", "c"), ("b", "d")], '"caption" is a list in each item; return one text, e.g. random.choice(captions)'),
        (torch.tensor([1, 2]), '"caption" is a tensor (2,) of int64; return one text for each item'),
        ([b"a", b"b"], '"caption" is bytes in an item; return a text'),
    ],
)
def test_unsuitable_caption(caption, message, check):
    assert check("text", caption=caption) == message


@pytest.mark.parametrize("kind", ["class", "classifier"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "is a text in an item; return the number of the class, an integer"),
        (torch.tensor([[1], [2]]), "has the shape (2, 1) in a batch; return the number of the class"),
        (torch.tensor([1.0, 2.0]), "is a tensor (2,) of float32; return the number of the class, an integer, e.g. of"),
        (torch.tensor([0, 11]), "has the value 11; "),
        (torch.tensor([0, -1]), "has the value -1; "),
    ],
    ids=["text", "column", "float", "too large", "negative"],
)
def test_unsuitable_label(kind, labels, message, check):
    error = check(kind, class_label=labels)
    assert error.startswith(f'"class_label" {message}')
    if message.endswith("; "):
        limit = {"class": "n_classes of the model is 11, which allows 0 to 10"}.get(
            kind, "num_classes of the model is 5"
        )
        assert limit in error


def test_labels_of_every_batch_are_checked(models):
    model, entries = models["class"]
    check = BatchCheck(model)
    check({"image": images(), **entries}, NAME)
    with pytest.raises(UserError, match="has the value 11"):
        check({"image": images(), "class_label": torch.tensor([11, 0])}, NAME)


def test_small_integers_are_labels_too(check):
    assert check("class", class_label=torch.tensor([0, 9], dtype=torch.uint8)) == []


def test_label_of_the_null_class_is_an_error_in_every_batch(models, caplog):
    model, _ = models["class"]
    check, batch = BatchCheck(model), {"image": images(), "class_label": torch.tensor([0, 10])}
    check(batch, NAME)
    assert not caplog.records
    model.cond_dropout = 0.1
    try:
        with pytest.raises(UserError) as raised:
            check(batch, NAME)
    finally:
        model.cond_dropout = 0.0
    assert str(raised.value) == (
        f'{NAME}: "class_label" has the value 10, which cond_dropout uses for the null class; set n_classes to 12'
    )


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("layout", {"coordinates_bbox": torch.full((2, 11), 300)}, '"coordinates_bbox" has the value 300; vocab_size'),
        (
            "layout",
            {"coordinates_bbox": torch.zeros(2, 14).long()},
            "has 14 tokens; max_seq_len of the model",
        ),
        (
            "layout",
            {"coordinates_bbox": torch.zeros(2, 11)},
            "of float32; return a row of integers",
        ),
        ("semantic", {"segmentation": torch.zeros(2, 182, 16, 16)}, "channels first"),
        ("semantic", {"segmentation": torch.zeros(2, 16, 16)}, "return an array (H, W, 182)"),
        ("inpainting", {"mask": torch.zeros(2, 16, 16, 1).bool()}, '"mask" is a tensor (2, 16, 16, 1) of bool; return'),
        ("inpainting", {"mask": (images()[..., :1] + 1) / 2}, "return 1 in the masked part and -1 elsewhere"),
        ("inpainting", {"masked_image": images().to(torch.uint8)}, '"masked_image" is a tensor'),
        ("superresolution", {"LR_image": images().to(torch.uint8)}, '"LR_image" is a tensor'),
        ("segmenter", {"segmentation": torch.full((2, 16, 16), 5)}, "has the value 5; num_classes of the model is 5"),
        ("segmenter", {"segmentation": torch.zeros(2, 16, 16, 3)}, "return class indices (H, W), or (H, W, 5)"),
    ],
)
def test_unsuitable_conditioning(kind, changes, message, check):
    assert message in check(kind, **changes)


def test_maps_of_any_type_and_form_are_accepted(check):
    assert check("semantic", segmentation=torch.zeros(2, 16, 16, 182, dtype=torch.uint8)) == []
    assert check("segmenter", segmentation=torch.zeros(2, 16, 16, 5)) == []
    assert check("segmenter", segmentation=torch.zeros(2, 16, 16, 1)) == []


def test_cached_entries_replace_images_and_conditioning(models):
    latents = {"latent_moments": torch.zeros(2, 6, 8, 8)}
    BatchCheck(models["text"][0])({**latents, "caption": ["a", "b"]}, NAME)
    BatchCheck(models["superresolution"][0])({**latents, "conditioning": torch.zeros(2, 3, 8, 8)}, NAME)
    with pytest.raises(UserError, match='no "caption"'):
        BatchCheck(models["text"][0])(latents, NAME)


def test_models_that_read_batches_in_their_own_way_are_not_checked(models):
    own = types.new_class("Own", (LatentDiffusion,), exec_body=lambda ns: ns.update(get_input=None, __module__="mine"))
    model = own.__new__(own)
    torch.nn.Module.__init__(model)
    for unknown in (model, torch.nn.Identity()):
        BatchCheck(unknown)([torch.zeros(1)], NAME)


def test_values_on_other_devices_are_not_read(models):
    """They would have to be waited for; the device "meta" has no values at all."""
    model, _ = models["class"]
    batch = {"image": torch.empty(2, 16, 16, 3, device="meta"), "class_label": torch.empty(2, device="meta").long()}
    BatchCheck(model)(batch, NAME)
