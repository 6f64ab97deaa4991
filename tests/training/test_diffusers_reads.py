"""diffusers reads the files that training writes: LoRA weights and learned embeddings."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch
from diffusers_folders import write_stable_diffusion
from safetensors.torch import load_file

import ldm
from ldm.config.instantiate import instantiate_from_config
from ldm.config.model_config import read_config
from ldm.io.diffusers import files
from ldm.pipelines.loading import for_inference
from ldm.pipelines.trained_parts import trained_parts

LORA = {"target": "ldm.modules.lora.LoRA", "params": {"rank": 3, "alpha": 6}}
WORDS = {
    "target": "ldm.modules.embedding_manager.EmbeddingManager",
    "params": {"placeholder_strings": ["<cat-toy>"], "num_vectors_per_token": 2},
}


@pytest.fixture
def folder(tmp_path):
    write_stable_diffusion(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def trained(folder, **additions):
    """Return a model with additions that have random values, and write the files of these to `folder`."""
    config = for_inference(read_config(files.config_file(folder)))
    config["params"] = {**config["params"], **additions, "use_ema": False, "ckpt_path": str(folder)}
    torch.manual_seed(0)
    model = instantiate_from_config(config)
    for parameter in model.adapted_parameters():
        torch.nn.init.normal_(parameter.data, std=0.1)
    for part in trained_parts(model.state_dict(), config):
        part.save(folder, {"step": 1})
    return model.eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    z, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 77, 16)))
    return z, torch.tensor([3, 800]), context


@torch.no_grad()
def test_lora_names_are_those_of_diffusers(folder):
    model = trained(folder, lora_config=LORA)
    expected = model.apply_model(*inputs())
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    plain = unet(*inputs()).sample
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    for name in [name for name in weights if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        weight = unet.get_submodule(layer.removeprefix("unet.")).weight
        weight += (weights[f"{layer}.lora_B.weight"] @ weights[name]).reshape(weight.shape)
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(unet(*inputs()).sample, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_load_lora_weights_returns_the_same_model(folder):
    pytest.importorskip("peft")
    expected = trained(folder, lora_config=LORA).apply_model(*inputs())
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(pipeline.unet(*inputs()).sample, expected, rtol=0, atol=1e-5)
    ours = ldm.load(folder, loras=[folder / "pytorch_lora_weights.safetensors"])
    torch.testing.assert_close(ours.apply_model(*inputs()), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "text", ["a <cat-toy> b", "<cat-toy>", "cat", "abc<cat-toy>,cat <CAT-TOY>", "x" * 80 + " <cat-toy>"]
)
def test_load_textual_inversion_returns_the_same_context(folder, text, caplog):
    expected = trained(folder, personalization_config=WORDS).get_learned_conditioning([text, "a cat"])
    ours = ldm.load(folder, embeddings=[folder / "learned_embeds.safetensors"])
    assert torch.equal(ours.get_learned_conditioning([text, "a cat"]), expected)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.load_textual_inversion(folder / "learned_embeds.safetensors")
    with caplog.at_level(logging.ERROR):
        theirs, _ = pipeline.encode_prompt(text.lower(), "cpu", 1, False)
    torch.testing.assert_close(theirs, expected[:1], rtol=0, atol=1e-5)
