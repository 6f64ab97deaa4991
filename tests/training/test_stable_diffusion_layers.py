"""The layers in configs/stable-diffusion train each model that they are written for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_models import make_model, write_clip

import main
from ldm.config.instantiate import instantiate_from_config
from ldm.io.checkpoint.reading import read_state_dict

LENGTH, WIDTH = 77, 16
NETWORK, FIRST_LAYER = "model.diffusion_model.", "model.diffusion_model.input_blocks.0.0.weight"
QUICK = [
    *("--enable_progress_bar", "false", "--enable_model_summary", "false", "--no-test", "--max_steps", "2"),
    *("--precision", "32", "--num_sanity_val_steps", "0", "lightning.callbacks.image_logger.params.disabled=true"),
    "data.params.num_workers=0",
]


def tiny(repo_root, name, vocabulary):
    """Return a layer that reduces the sizes of one of the published configurations to those of tiny models."""
    encoder = {"tokenizer": str(vocabulary)}
    heads = {"num_heads": 2}
    if name.startswith("v1"):
        sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": WIDTH}
        encoder["text_config"] = {"vocab_size": 56, "max_position_embeddings": LENGTH, **sizes, **ids}
    else:
        sizes = {"width": WIDTH, "heads": 2, "layers": 2, "embed_dim": 8}
        encoder["text_config"] = {"vocab_size": 56, "context_length": LENGTH, **sizes}
        heads = {"num_head_channels": 16}
    levels = {"channel_mult": [1, 1], "num_res_blocks": 1, "attention_resolutions": [2]}
    network = {"model_channels": 32, "context_dim": WIDTH, "image_size": 8, **levels, **heads}
    stage = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 16}
    return {
        "model": {
            "params": {
                "image_size": 8,
                "unet_config": {"params": network},
                "first_stage_config": {"params": {"ddconfig": stage}},
                "cond_stage_config": {"params": encoder},
            }
        }
    }


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(np.full((20, 16, 3), 80 * index, np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a cat")
    return folder


@pytest.fixture
def train(tmp_path, repo_root, images, monkeypatch):
    """Return `train(name, *layers, start, **overrides)`, which trains a tiny model for two steps."""
    monkeypatch.chdir(tmp_path)
    vocabulary = write_clip(tmp_path / "clip")

    def run(name, *layers, start=None, **overrides):
        small, folder = tiny(repo_root, name, vocabulary), repo_root / "configs" / "stable-diffusion"
        OmegaConf.save(OmegaConf.create(small), "tiny.yaml")
        original = OmegaConf.merge(OmegaConf.load(folder / f"{start or name}.yaml"), OmegaConf.create(small)).model
        original = OmegaConf.to_container(original)
        original["params"].pop("base_learning_rate", None)
        original["params"]["unet_config"]["params"]["use_fp16"] = False
        weights = make_model({"target": original["target"], "params": original["params"]}).state_dict()
        torch.save({"state_dict": weights}, "weights.ckpt")
        files = [folder / f"{each}.yaml" for each in (name, *layers)]
        words = [f"{key}={value}" for key, value in overrides.items()]
        arguments = ["-t", "-b", *files, "tiny.yaml", "-l", "logs", *QUICK, "model.params.ckpt_path=weights.ckpt"]
        assert main.main([*map(str, arguments), *words]) == 0
        (folder,) = (tmp_path / "logs").iterdir()
        return folder, weights, read_state_dict(folder / "checkpoints" / "last.ckpt")

    return run


def changed(before, after):
    return {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}


def data(images, dataset=""):
    start = f"data.params.train.params.{dataset}"
    return {f"{start}data_root": images, f"{start}size": 16}


@pytest.mark.parametrize("name", ["v1-inference", "v2-inference", "v2-inference-v"])
def test_fine_tuning_of_each_version(name, train, images):
    _, before, after = train(name, "finetuning", **data(images))
    assert changed(before, after) == {each for each in after if each.startswith(NETWORK)}
    assert {each.partition(".")[0] for each in after} & {"model_ema"} == set()


@pytest.mark.parametrize(
    ("name", "start"),
    [("v1-inpainting-inference", "v1-inference"), ("v2-inpainting-inference", "v2-inference"), (None, None)],
)
def test_fine_tuning_for_inpainting(name, start, train, images):
    name = name or "v1-inpainting-inference"
    keys = data(images, "dataset.params.")
    _, before, after = train(name, "inpainting-finetuning", start=start, **keys)
    assert after[FIRST_LAYER].shape[1] == 9
    assert before[FIRST_LAYER].shape[1] == (9 if start is None else 4)
    others = {each for each in before if each.startswith(NETWORK)} - {FIRST_LAYER}
    assert others <= changed({**before, FIRST_LAYER: after[FIRST_LAYER]}, after)


@pytest.mark.parametrize("name", ["v1-inference", "v2-inference-v"])
def test_lora_over_fine_tuning(name, train, images):
    run, before, after = train(name, "finetuning", "lora", **data(images))
    assert changed(before, after) == set() and set(before) <= set(after)
    assert (run / "pytorch_lora_weights.safetensors").is_file()


def test_lora_over_inpainting(train, images):
    keys = data(images, "dataset.params.")
    run, before, after = train("v1-inpainting-inference", "inpainting-finetuning", "lora", **keys)
    assert changed(before, after) == set() and (run / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("name", ["v1-inference", "v2-inference-v"])
def test_textual_inversion(name, train, images):
    words = "model.params.personalization_config.params"
    given = {f"{words}.initializer_words": "[cat]", f"{words}.placeholder_strings": "[<my-cat>]"}
    run, before, after = train(name, "textual-inversion", **given, **data(images))
    assert changed(before, after) == set()
    assert set(after) - set(before) == {"cond_stage_model.embedding_manager.vectors.0"}
    assert (run / "learned_embeds.safetensors").is_file()
    (project,) = (run / "configs").glob("*-project.yaml")
    saved = OmegaConf.load(project)
    dataset = instantiate_from_config(OmegaConf.to_container(saved.data.params.train))
    assert "<my-cat>" in dataset.entries(0)["caption"], "the captions have the token of the model"
