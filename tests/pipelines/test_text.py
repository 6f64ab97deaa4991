"""Tests of `ldm.pipelines.text`, and of the recorded text-to-image pipeline."""

from __future__ import annotations

import pytest
import torch
from parity_cases import assert_close, build, load_case
from text_images import sample_text
from tiny_models import write_model

from ldm.pipelines.loading import load_model
from ldm.pipelines.text import unknown_words, warn_unknown_words


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder)
    return load_model(folder / "config.yaml", folder / "model.ckpt")


def sample(model, prompts, seed=0, **options):
    torch.manual_seed(seed)
    return sample_text(model, prompts, steps=4, **options)


def test_same_seed_samples_the_same_image(model):
    first, again, other = sample(model, ["a", "b"]), sample(model, ["a", "b"]), sample(model, ["a", "b"], seed=1)
    assert first.shape == (2, 3, 16, 16) and first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_negative_prompt_is_the_unconditional_conditioning(model):
    """The prediction is u + s (c - u) at scale s, so at scale 0 only the negative prompt counts."""
    noise = torch.randn(1, 3, 8, 8)
    negative = sample_text(model, ["rocket"], steps=4, scale=0.0, negative_prompt="fox", x_T=noise)
    fox = sample_text(model, ["fox"], steps=4, x_T=noise)
    assert_close(negative, fox)


def test_given_noise_makes_images_independent_of_their_batch(model):
    noise = torch.randn(3, 3, 8, 8)
    options, prompts = {"steps": 3, "scale": 2.0}, ["rocket", "fox", "red heart"]
    together = sample_text(model, prompts, x_T=noise, **options)
    apart = [sample_text(model, [p], x_T=noise[i : i + 1], **options) for i, p in enumerate(prompts)]
    assert_close(torch.cat(apart), together)


def test_prompt_changes_the_image(model):
    """Otherwise half of these tests would compare equal images."""
    noise = torch.randn(1, 3, 8, 8)
    rocket, fox = (sample_text(model, [prompt], x_T=noise) for prompt in ("rocket", "fox"))
    assert not torch.allclose(rocket, fox, atol=1e-3)


def test_recorded_images_are_reproduced(monkeypatch):
    """The record is the published pipeline, from seed to pixels: its captions were token ids, the empty one zeros."""
    case = load_case("text_to_image_pipeline")
    model, encode = build(case), type(build(case)).get_learned_conditioning
    tokens = case.inputs["tokens"]
    ids = {"first": tokens[0], "second": tokens[1], "": torch.zeros_like(tokens[0])}
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c: encode(model, torch.stack([ids[x] for x in c])))
    torch.manual_seed(16)
    images = sample_text(model, ["first", "second"], size=(16, 16), sampler="ddim", steps=5, eta=0.0, scale=5.0)
    assert_close(images, case.outputs["decoded"].clamp(-1, 1))


def test_unknown_words_are_found_once(model, caplog):
    assert unknown_words(model, ["rocket zzyx", "zzyx ROCKET"]) == ["zzyx"]
    warn_unknown_words(model, ["rocket"])
    assert not caplog.records
    warn_unknown_words(model, ["rocket zzyx"])
    assert "not in the vocabulary of the model: zzyx" in caplog.text
