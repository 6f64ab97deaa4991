"""Training of the vectors of new words: the model stays as it is, and the file has the form of diffusers."""

from __future__ import annotations

import shutil

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from stable_diffusion_runs import (
    LORA,
    VECTORS,
    WORDS,
    Runs,
    assert_refused,
    changed,
    errors,
    loss,
    masked,
    personalized,
    words_config,
    write_images,
)
from tiny_models import text_config
from tiny_stable_diffusion import text_inpainting_config

import ldm
from ldm.cli.export_model import main as run_export
from ldm.cli.replay import main as replay
from ldm.cli.txt2img import main as txt2img
from ldm.config.instantiate import instantiate_from_config
from ldm.io.checkpoint.reading import read_state_dict


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Runs(tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_textual_inversion_trains_the_vectors_alone(version, runs, images, tmp_path):
    config, before = words_config(runs, tmp_path, version)
    initial = instantiate_from_config(config).state_dict()
    embeddings = next(value for name, value in before.items() if name.endswith("token_embedding.weight"))
    assert torch.equal(initial[VECTORS], embeddings[[55, 55]]), "the word cat"
    run, after = runs.train(config, personalized(images), "model.base_learning_rate=0.05")
    assert changed(before, after) == set(), "bit-equal"
    assert set(after) - set(before) == {VECTORS}
    assert (after[VECTORS] - initial[VECTORS]).abs().amax(dim=1).gt(0.1).all(), "both vectors"
    assert loss(config, after, personalized(images)) < loss(config, initial, personalized(images))
    with safe_open(run / "learned_embeds.safetensors", "pt") as file:
        assert list(file.keys()) == ["<cat-toy>"] and torch.equal(file.get_tensor("<cat-toy>"), after[VECTORS])
        assert file.metadata()["step"] == "20"


def test_embedding_file_and_checkpoint_are_the_same_model(runs, images, tmp_path):
    config, _ = words_config(runs, tmp_path)
    run, _ = runs.train(config, personalized(images), "model.base_learning_rate=0.05", max_steps=4)
    base = tmp_path / "base.yaml"
    params = {k: v for k, v in config["params"].items() if k not in ("personalization_config", "ckpt_path")}
    OmegaConf.save(OmegaConf.create({"model": {**config, "params": params}}), base)
    file = run / "learned_embeds.safetensors"
    with_file = ldm.load(config=base, checkpoint=tmp_path / "weights.ckpt", embeddings=[file])
    from_run, plain = ldm.load(run), ldm.load(config=base, checkpoint=tmp_path / "weights.ckpt")
    prompts = ["a <cat-toy> b", "a cat"]
    contexts = [model.get_learned_conditioning(prompts) for model in (with_file, from_run, plain)]
    assert torch.equal(contexts[0], contexts[1])
    assert torch.equal(contexts[0][1], contexts[2][1]), "other prompts do not change"
    assert not torch.equal(contexts[0][0], contexts[2][0])


def test_commands_sample_from_the_run(runs, images, tmp_path, capsys):
    config, _ = words_config(runs, tmp_path, lora_config=LORA)
    run, _ = runs.train(config, personalized(images), "model.base_learning_rate=0.05", max_steps=4)
    shared = ["--seed", "1", "--ddim_steps", "2", "--n_samples", "1", "--H", "16", "--W", "16", "--skip_grid"]
    pixels = {}
    for prompt in ("a <cat-toy>", "a cat"):
        out = tmp_path / f"out{len(pixels)}"
        assert txt2img(["--model", str(run), "--prompt", prompt, "--outdir", str(out), *shared]) == 0
        (image,) = out.rglob("*.png")
        pixels[prompt] = Image.open(image).tobytes()
        assert replay([str(image)]) == 0 and "identical" in capsys.readouterr().out
    assert pixels["a <cat-toy>"] != pixels["a cat"]


def test_resumed_textual_inversion_equals_an_uninterrupted_run(runs, images, tmp_path):
    config, _ = words_config(runs, tmp_path)
    _, expected = runs.train(config, personalized(images), logs="whole", max_steps=6)
    run, _ = runs.train(config, personalized(images), logs="halves", max_steps=3)
    (tmp_path / "weights.ckpt").unlink()
    assert runs.start("-r", run, "--max_steps", "6") == 0
    assert changed(expected, read_state_dict(run / "checkpoints" / "last.ckpt")) == set()


def test_resuming_with_another_token_or_file_raises_user_error(runs, images, tmp_path, capsys):
    config, _ = words_config(runs, tmp_path)
    run, _ = runs.train(config, personalized(images), max_steps=1)
    token = "model.params.personalization_config.params.placeholder_strings"
    for override, message in (
        (f"{token}=[<dog>]", f"{token} names the vectors in the checkpoint of the run; leave it out when resuming"),
        ("model.params.embedding_manager_ckpt=x.pt", "has no effect on a resumed run"),
    ):
        assert runs.start("-r", run, "--max_steps", "2", override) == 2
        (error,) = errors(capsys)
        assert message in error
    assert runs.start("-r", run, "--max_steps", "2", f"{token}=[<cat-toy>]") == 0, "the same token"


def test_textual_inversion_with_cached_latents(runs, images, tmp_path):
    config, before = words_config(runs, tmp_path)
    run, after = runs.train(config, personalized(images), "data.params.latent_cache.variants=1", max_steps=2)
    assert changed(before, after) == set() and (run / "learned_embeds.safetensors").is_file()


def test_published_configuration_of_textual_inversion(runs, images, tmp_path, capsys):
    params = {"placeholder_strings": ["*"], "initializer_words": ["cat"], "num_vectors_per_token": 1}
    words = {**WORDS, "params": {**params, "per_image_tokens": False, "progressive_words": False}}
    published = {"cond_stage_trainable": True, "use_ema": False, "embedding_reg_weight": 0.0}
    config, before = words_config(runs, tmp_path, personalization_config=words, **published)
    published = {"data_root": str(images), "size": 16, "set": "train", "per_image_tokens": False, "repeats": 4}
    data = {"target": "ldm.data.personalized.PersonalizedBase", "params": published}
    run, after = runs.train(config, data, "data.params.wrap=false", max_steps=2)
    assert changed(before, after) == set() and set(after) - set(before) == {VECTORS}
    assert list(load_file(run / "learned_embeds.safetensors")) == ["*"]
    config["params"]["embedding_reg_weight"] = 0.1
    shutil.rmtree(tmp_path / "logs")
    assert_refused(runs, config, data, "embedding_reg_weight is not implemented; leave it at 0", capsys)


def test_vectors_start_from_a_file(runs, tmp_path):
    config, _ = words_config(runs, tmp_path)
    vectors = torch.randn(2, 16)
    torch.save({"<cat-toy>": vectors}, tmp_path / "start.bin")
    config["params"]["embedding_manager_ckpt"] = str(tmp_path / "start.bin")
    model = instantiate_from_config(config)
    assert torch.equal(model.state_dict()[VECTORS], vectors)
    assert model.embedding_manager is model.cond_stage_model.embedding_manager, "the published name"


def test_lora_and_textual_inversion_together(runs, images, tmp_path):
    config, before = words_config(runs, tmp_path, lora_config=LORA, use_ema=True)
    run, after = runs.train(config, personalized(images), max_steps=2)
    assert changed(before, after) == set()
    assert sorted(path.name for path in run.glob("*.safetensors")) == [
        "learned_embeds.safetensors",
        "pytorch_lora_weights.safetensors",
    ]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"placeholder_strings": ["cat"]}, 'EmbeddingManager: the token "cat" is a word of the vocabulary; choose'),
        ({"initializer_words": ["abc"]}, 'EmbeddingManager: the initializer word "abc" is 3 tokens of the vocabulary'),
        ({"num_vectors_per_token": 0}, "EmbeddingManager: num_vectors_per_token must be an integer of at least 1, not"),
        ({"placeholder_strings": ["<a>", "<A>"]}, 'EmbeddingManager: the token "<A>" exists already; give each'),
        ({"initializer_words": ["a", "b"]}, "EmbeddingManager: 2 initializer_words for 1 placeholder_strings; give"),
        ({"per_image_tokens": True}, "EmbeddingManager: per_image_tokens, progressive_words and initializer_per_img"),
    ],
    ids=str,
)
def test_invalid_words_raise_user_error(params, message, runs, images, tmp_path, capsys):
    words = {**WORDS, "params": {**WORDS["params"], **params}}
    config, _ = words_config(runs, tmp_path, personalization_config=words)
    assert_refused(runs, config, personalized(images), message, capsys)


def test_textual_inversion_of_other_models_raises_user_error(runs, images, tmp_path, capsys):
    config = text_config(personalization_config=WORDS)
    message = "personalization_config needs a text-to-image model with a text encoder of Stable Diffusion, and this"
    assert_refused(runs, config, personalized(images), f"{message} configuration names BERTEmbedder", capsys)
    config = text_inpainting_config(1, tmp_path / "clip", personalization_config=WORDS)
    message += " configuration names LatentInpaintDiffusion"
    assert_refused(runs, config, masked(images), message, capsys)


def test_export_writes_embeddings(runs, images, tmp_path):
    config, _ = words_config(runs, tmp_path)
    run, after = runs.train(config, personalized(images), max_steps=1)
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert export("--ckpt", checkpoint, "--outdir", tmp_path / "words") == 0
    written = load_file(tmp_path / "words" / "learned_embeds.safetensors")
    assert list(written) == ["<cat-toy>"] and torch.equal(written["<cat-toy>"], after[VECTORS].half())


def export(*arguments):
    return run_export([str(argument) for argument in arguments])
