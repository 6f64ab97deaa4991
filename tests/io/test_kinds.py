"""Tests of `ldm.io.checkpoint.kinds`: files that are given as a model and are something else."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tiny_models import text_config

import ldm
from ldm.cli.txt2img import main as txt2img
from ldm.errors import UserError
from ldm.io.checkpoint.kinds import foreign_kind

UNET = "model.diffusion_model.input_blocks"
# Names and shapes that are typical of each kind of file.
FILES = {
    "a Stable Diffusion XL model": {
        f"{UNET}.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
    },
    "a Stable Diffusion XL model, or one of its relatives": {
        f"{UNET}.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    },
    "a Stable Diffusion 3 model": {
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536),
        "model.diffusion_model.x_embedder.proj.weight": (1536, 16, 2, 2),
    },
    "a Flux model": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)},
    "a ControlNet": {"control_model.input_hint_block.0.weight": (16, 3, 3, 3), f"{UNET}.0.0.weight": (320, 4, 3, 3)},
    "a LoRA": {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 1280, 1, 1),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (1280, 4, 1, 1),
    },
    "a LoRA for Stable Diffusion XL": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)},
    "a LoRA for Flux": {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)},
    "an upscaler": {"body.0.rdb1.conv1.weight": (32, 64, 3, 3), "conv_first.weight": (64, 3, 3, 3)},
    "an embedding of a textual inversion": {"emb_params": (2, 768)},
    "an IP-Adapter": {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
    "the U-Net of a diffusers folder alone": {
        "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
        "up_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
    },
    "a first stage alone": {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
    },
    "a text encoder alone": {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
}


@pytest.mark.parametrize("kind", FILES)
def test_kind_is_found_by_names(kind):
    assert foreign_kind(FILES[kind]).what.startswith(kind)


@pytest.mark.parametrize(("name", "shape"), [("<cat>", (768,)), ("<cat>", (2, 1024)), ("cat toy", (1, 1280))])
def test_embedding_of_diffusers_is_found_by_its_width(name, shape):
    assert foreign_kind({name: shape}).what == "an embedding of a textual inversion"
    assert foreign_kind({name: (*shape[:-1], 760)}) is None
    assert foreign_kind({f"{name}.weight": shape}) is None


def test_models_of_this_package_are_of_no_other_kind():
    from ldm.config.instantiate import instantiate_from_config

    with torch.device("meta"):
        weights = instantiate_from_config(text_config(use_ema=True)).state_dict()
    assert foreign_kind({name: tuple(value.shape) for name, value in weights.items()}) is None
    assert foreign_kind({"anything": (1,)}) is None


def write(path, kind):
    save_file({name: torch.zeros(1).expand(shape).clone() for name, shape in small(FILES[kind]).items()}, path)
    return path


def small(shapes):
    """Return the shapes with at most 8 values along each dimension, except for the channels of a context."""
    return {name: tuple(min(size, 8) for size in shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "a LoRA for Stable Diffusion XL"])
def test_library_names_the_kind_of_a_file_without_configuration(tmp_path, kind):
    with pytest.raises(UserError, match=f'^"{tmp_path}/x.safetensors" is {kind}[^\n]*$'):
        ldm.load(checkpoint=write(tmp_path / "x.safetensors", kind))


@pytest.mark.parametrize("kind", ["a Stable Diffusion XL model", "a Flux model", "a LoRA", "an upscaler"])
def test_command_prints_one_line_and_exits_with_2(tmp_path, kind, capsys):
    file = write(tmp_path / "x.safetensors", kind)
    assert txt2img(["--ckpt", str(file), "--outdir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f'"{file}" is {kind}' in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a Stable Diffusion XL model", "a ControlNet", "a LoRA"])
def test_kind_is_named_if_a_configuration_is_given(tmp_path, kind):
    config = tmp_path / "x.yaml"
    OmegaConf.save(OmegaConf.create({"model": text_config()}), config)
    with pytest.raises(UserError, match=f'x.safetensors" is {kind}'):
        ldm.load(checkpoint=write(tmp_path / "x.safetensors", kind), config=config)


def test_embedding_of_the_first_form_has_no_weights(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 8)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="embedding of a textual inversion"):
        ldm.load(checkpoint=tmp_path / "x.pt")
