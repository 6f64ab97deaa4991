"""Tests of `ldm.pipelines.text`, and of the recorded text-to-image pipeline."""

from __future__ import annotations

import pytest
import torch
from parity_cases import assert_close, build, load_case
from text_images import sample_text
from tiny_models import make_model, text_config, write_clip, write_model
from tiny_stable_diffusion import stable_diffusion_config

import ldm
from ldm.config.model_config import read_config
from ldm.config.model_info import ModelInfo
from ldm.pipelines import sampling
from ldm.pipelines.loading import load_model
from ldm.pipelines.text import published_settings, unknown_words, warn_unknown_words


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


def test_cut_prompts_are_one_line_each(model, caplog):
    """The model reads 16 tokens; every distinct prompt counts once, not every image, batch or step."""
    long, other, negative = 10 * "Red Heart ", "fox " * 15, "Rainbow " * 16
    options = {"steps": 2, "seed": 1, "batch_size": 2, "progress": False}
    ldm.text_to_image(model, [long, "fox", long, other, long], negative_prompt=negative, **options)
    assert [record.getMessage() for record in caplog.records] == [
        f'the {kind} "{start}" has {tokens} tokens (start and end token included), '
        f'and the model reads 16; cut: "… {cut}"'
        for kind, start, tokens, cut in (
            ("prompt", "Red Heart Red Heart Red Heart Red Heart…", 22, "Red Heart Red Heart Red Heart"),
            ("prompt", "fox fox fox fox fox fox fox fox fox fox…", 17, "fox"),
            ("negative prompt", "Rainbow Rainbow Rainbow Rainbow Rainbow…", 18, "Rainbow Rainbow"),
        )
    ]


def test_cut_text_does_not_change_the_image(model):
    kept = " ".join(14 * ["fox"])
    noise = torch.randn(1, 3, 8, 8)
    assert torch.equal(sample_text(model, [kept], x_T=noise), sample_text(model, [f"{kept} rocket"], x_T=noise))


# -- Stable Diffusion ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "scale"), [(1, 7.5), (2, 9.0)])
def test_defaults_of_stable_diffusion_are_the_published_ones(tmp_path, monkeypatch, version, scale):
    pytest.importorskip("transformers")
    model, seen = make_model(stable_diffusion_config(version, write_clip(tmp_path / "clip"))), {}

    def sample_latents(model, shape, **settings):
        seen.update(settings, shape=shape)
        return torch.zeros(shape)

    monkeypatch.setattr(sampling, "sample_latents", sample_latents)
    ldm.text_to_image(model, "cat", progress=False)
    assert (seen["steps"], seen["scale"], seen["shape"]) == (50, scale, (1, 4, 8, 8))
    ldm.text_to_image(model, "cat", progress=False, scale=3)
    assert seen["scale"] == 3


@pytest.mark.parametrize(
    ("path", "side", "settings"),
    [
        ("stable-diffusion/v1-inference.yaml", 512, {"steps": 50, "scale": 7.5}),
        ("stable-diffusion/v2-inference.yaml", 512, {"steps": 50, "scale": 9.0}),
        ("stable-diffusion/v2-inference-v.yaml", 768, {"steps": 50, "scale": 9.0}),
        ("latent-diffusion/txt2img-1p4B-eval.yaml", 256, {}),
    ],
)
def test_size_and_settings_follow_from_the_configuration(repo_root, path, side, settings):
    info = ModelInfo("m", read_config(repo_root / "configs" / path))
    assert (info.size.height, info.size.width) == (side, side)
    assert published_settings(info) == settings


def test_other_models_keep_their_defaults(monkeypatch):
    seen = {}
    monkeypatch.setattr(sampling, "sample_latents", lambda m, shape, **s: seen.update(s) or torch.zeros(shape))
    ldm.text_to_image(make_model(text_config()), "fox", progress=False)
    assert (seen["steps"], seen["scale"]) == (50, 5.0)


def test_recorded_text_to_image_of_stable_diffusion_is_reproduced(monkeypatch):
    """The record is the published chain, from token ids to pixels."""
    case = load_case("sd1_ddim_text_to_image")
    model, learned = build(case), type(build(case)).get_learned_conditioning
    tokens = {"a": case.inputs["tokens"], "": case.inputs["uncond_tokens"]}
    monkeypatch.setattr(model, "get_learned_conditioning", lambda texts: learned(model, tokens[texts[0]]))
    torch.manual_seed(42)
    images = sample_text(model, ["a", "a"], size=(16, 16), sampler="ddim", steps=10, eta=0.0, scale=7.5)
    assert_close(images, case.outputs["decoded"].clamp(-1, 1))
