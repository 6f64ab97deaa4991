"""Tests of `ldm.pipelines.generation`: batches, packing, and the position of each image."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from library_tasks import random_images
from tiny_models import make_model, text_config

from ldm.modules.packing import has_packed_weights
from ldm.pipelines import generation
from ldm.pipelines.generation import BatchPosition, Item, batches, generate
from ldm.pipelines.image import ImagePrompt, ImageToImage
from ldm.pipelines.text import TextToImage


@pytest.fixture(scope="module")
def model():
    return make_model(text_config())


@pytest.fixture
def entered(monkeypatch):
    """Return a list that collects whether each preparation packs the weights."""
    prepared, found = generation.prepared, []

    @contextmanager
    def counted(model, packed):
        assert not has_packed_weights(model), "preparations are not nested"
        found.append(packed)
        with prepared(model, packed):
            yield

    monkeypatch.setattr(generation, "prepared", counted)
    return found


def items(count: int, first: int = 0) -> list[Item]:
    return [Item(first + i, first + i, "fox") for i in range(count)]


def sample(model, steps=2, given=None, count=4, **options):
    given, count = (items(count), count) if given is None else (given, len(given))
    pipeline = TextToImage(steps=steps, scale=1.0)
    return list(generate(pipeline, model, given, count=count, progress=False, **options))


# -- batches ---------------------------------------------------------------------------------------------------


def image_items(*sizes):
    return [Item(i, i, ImagePrompt(random_images(1, *size)[0])) for i, size in enumerate(sizes)]


def test_neighbours_of_the_same_size_share_a_batch():
    given = image_items((8, 8), (8, 8), (8, 8), (4, 8), (8, 8))
    grouped = [[item.index for item in batch] for batch in batches(ImageToImage(), given, 2)]
    assert grouped == [[0, 1], [2], [3], [4]]
    assert list(batches(ImageToImage(), [], 2)) == []


def test_items_are_read_batch_by_batch(model):
    """A run of thousands of images does not hold all of its inputs in memory."""
    read = []

    def lazily():
        for item in items(6):
            read.append(item.index)
            yield item

    samples = generate(TextToImage(steps=1, scale=1.0), model, lazily(), count=6, batch_size=2, progress=False)
    next(samples)
    assert len(read) == 3, "the third item shows that the first batch is complete"
    samples.close()


def test_samples_have_their_position_pixels_and_latents(model):
    samples = sample(model, count=3, batch_size=2)
    assert [each.position for each in samples] == [
        BatchPosition(0, 0, 2, True),
        BatchPosition(1, 1, 2, True),
        BatchPosition(2, 0, 1, False),
    ]
    assert all(each.pixels.shape == (16, 16, 3) and each.latents.shape == (3, 8, 8) for each in samples)
    undecoded = sample(model, count=3, batch_size=2, decoded=False)
    assert all(each.pixels is None for each in undecoded)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(samples, undecoded, strict=True))


def test_expected_number_of_steps_follows_the_sizes(model):
    """Each size needs a batch of its own, which is known when its turn comes."""
    calls = []
    given = image_items((16, 16), (16, 16), (8, 16))
    pipeline = ImageToImage(steps=4, strength=0.5, scale=1.0)
    generate_all = generate(
        pipeline, model, given, count=3, batch_size=2, progress=False, callback=lambda *call: calls.append(call)
    )
    assert len(list(generate_all)) == 3
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


# -- packing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "count", "batch_size", "packed"),
    [(3, 1, 1, False), (4, 1, 1, True), (3, 4, 4, False), (2, 2, 1, True), (1, 4, 1, True), (1, 3, 1, False)],
)
def test_weights_are_packed_from_four_evaluations(model, entered, steps, count, batch_size, packed):
    samples = sample(model, steps, count=count, batch_size=batch_size)
    assert entered == [packed]
    assert [each.position.packed for each in samples] == count * [packed]
    assert not has_packed_weights(model)


def test_ancestral_sampler_counts_all_timesteps(model, entered):
    pipeline = TextToImage(steps=1, scale=1.0, sampler="ddpm")
    (sampled,) = generate(pipeline, model, items(1), count=1, progress=False)
    assert entered == [True] and sampled.position.packed


def test_remaining_batches_decide_for_each_batch_shape(model, entered):
    """Of five images, two pairs take 4 evaluations; the last image takes 2."""
    samples = sample(model, 2, count=5, batch_size=2)
    assert entered == [True, False]
    assert [each.position.packed for each in samples] == [True, True, True, True, False]


@pytest.mark.parametrize("packed", [True, False])
def test_packing_can_be_prescribed(model, entered, packed):
    for steps in (2, 12):
        samples = sample(model, steps, count=1, packed=packed)
        assert samples[0].position.packed is packed
    assert entered == [packed, packed]


def test_packing_changes_images_only_by_rounding(model):
    packed, plain = (sample(model, 3, count=2, packed=packed)[0].pixels.astype(int) for packed in (True, False))
    assert np.abs(packed - plain).max() <= 1


def test_error_restores_the_model(model):
    def broken():
        yield from items(2)
        raise RuntimeError("an input cannot be read")

    with pytest.raises(RuntimeError, match="an input cannot be read"):
        list(generate(TextToImage(steps=12, scale=1.0), model, broken(), count=3, progress=False))
    assert not has_packed_weights(model)


# -- values that are not finite --------------------------------------------------------------------------------


def noise_with(value: float, *indices: int) -> torch.Tensor:
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noise[list(indices), 1, 2, 3] = value
    return noise


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("decoded", [True, False])
def test_latents_that_are_not_finite_are_an_error_of_their_image(model, value, decoded):
    given = items(4, first=10)
    given = [Item(index, item.seed, item.request) for index, item in enumerate(given)]
    options = {"given": given, "batch_size": 2, "decoded": decoded}
    expected = sample(model, latents=noise_with(0.0, 2), **options)
    samples = sample(model, latents=noise_with(value, 2), **options)
    assert [each.error is None for each in samples] == [True, True, False, True]
    assert str(samples[2].error) == "the latents of image 2 (seed 12) are not finite; check the weights of the model"
    assert samples[2].pixels is None and samples[2].position == expected[2].position
    for index in (0, 1, 3):
        assert torch.equal(samples[index].latents, expected[index].latents)
        assert not decoded or (samples[index].pixels == expected[index].pixels).all()


@pytest.mark.parametrize(
    ("settings", "dtype", "remedy"),
    [
        ({"scale": 1e30}, torch.float32, "lower the guidance scale or check the weights of the model"),
        ({"scale": 1.0, "eta": 1.0}, torch.float32, "lower eta or check the weights of the model"),
        (
            {"scale": 1e30, "eta": 1.0},
            torch.bfloat16,
            "use the precision float32 or lower the guidance scale or lower eta or check the weights of the model",
        ),
    ],
)
def test_error_names_settings_that_help(settings, dtype, remedy):
    model, noise = make_model(text_config()).to(dtype), noise_with(float("nan"), 0)[:1]
    pipeline = TextToImage(steps=2, **settings)
    (failed,) = generate(pipeline, model, items(1), count=1, latents=noise, progress=False)
    assert str(failed.error) == f"the latents of image 0 (seed 0) are not finite; {remedy}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_an_error_of_their_image(model, monkeypatch, value):
    decode = model.decode_first_stage

    def decode_with_error(z):
        images = decode(z)
        images[1, 0, 3, 3] = value
        return images

    expected = sample(model, count=3, batch_size=3)
    monkeypatch.setattr(model, "decode_first_stage", decode_with_error)
    samples = sample(model, count=3, batch_size=3)
    assert str(samples[1].error) == "the pixels of image 1 (seed 1) are not finite; check the weights of the model"
    assert samples[1].pixels is None and samples[1].latents.isfinite().all()
    for index in (0, 2):
        assert samples[index].error is None and (samples[index].pixels == expected[index].pixels).all()
