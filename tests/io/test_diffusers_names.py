"""Tests of `ldm.io.diffusers`: configurations, names and shapes of the published models, on the meta device."""

from __future__ import annotations

import gzip
import json
from functools import cache

import diffusers
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from parity_cases import PARITY

from ldm.errors import UserError
from ldm.io.diffusers import autoencoder, scheduler, text_encoder, unet
from ldm.io.diffusers.translation import Layer, Translation

FIRST_STAGES = [
    f"models/first_stage_models/{name}/config.yaml"
    for name in ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")
]
STABLE_DIFFUSION = [
    "v1-inference",
    "v1-inpainting-inference",
    "v2-inference-v",
    "v2-inpainting-inference",
    "x4-upscaling",
]
LATENT_DIFFUSION = [
    "models/ldm/celeba256/config.yaml",
    "models/ldm/bsr_sr/config.yaml",
    "models/ldm/lsun_beds256/config.yaml",
    "models/ldm/cin256/config.yaml",
    "models/ldm/text2img256/config.yaml",
    "models/ldm/layout2img-openimages256/config.yaml",
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
]


@cache
def manifest(name):
    """Return names and shapes of a published model."""
    file = "state_dicts.json.gz" if "/" in name else "stable_diffusion/state_dicts.json.gz"
    recorded = json.loads(gzip.decompress((PARITY / file).read_bytes()))
    return recorded["models"][name] if "/" in name else recorded[name]


def part(name, prefix):
    """Return the weights of one part of a published model on the meta device."""
    shapes = manifest(name)
    found = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return {key: torch.empty(shape, device="meta") for key, shape in found.items() if not key.startswith("loss.")}


def read(repo_root, name):
    path = name if "/" in name else f"configs/stable-diffusion/{name}.yaml"
    return OmegaConf.to_container(OmegaConf.load(repo_root / path).model, resolve=True)


def shapes(weights):
    return {name: tuple(value.shape) for name, value in weights.items()}


def build(config):
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(dict(config))


@pytest.mark.parametrize("name", [*STABLE_DIFFUSION, *LATENT_DIFFUSION])
def test_unet_has_all_names_in_both_directions(name, repo_root):
    params = read(repo_root, name)["params"]["unet_config"]["params"]
    config = unet.theirs(params)
    theirs = build(config).state_dict()
    ours = part(name, "model.diffusion_model.")
    translation = Translation(unet.layers(params))
    assert shapes(translation.to_theirs(ours)) == shapes(theirs)
    assert shapes(translation.to_ours(theirs)) == shapes(ours)
    back = unet.ours(json.loads(json.dumps(config)), "the test")
    assert shapes(Translation(unet.layers(back)).to_ours(theirs)) == shapes(ours)
    again = unet.theirs(back)
    assert again == config, "the configuration is the same after both directions"


@pytest.mark.parametrize("name", [*FIRST_STAGES, *STABLE_DIFFUSION, "models/ldm/celeba256/config.yaml"])
def test_first_stage_has_all_names_in_both_directions(name, repo_root):
    config = read(repo_root, name)
    alone = name in FIRST_STAGES
    stage = config if alone else config["params"]["first_stage_config"]
    theirs_config = autoencoder.theirs(stage, 0.5)
    theirs = build(theirs_config).state_dict()
    ours = part(name, "" if alone else "first_stage_model.")
    translation = Translation(autoencoder.layers(stage["params"]["ddconfig"]))
    assert shapes(translation.to_theirs(ours)) == shapes(theirs)
    assert shapes(translation.to_ours(theirs)) == shapes(ours)
    back = autoencoder.ours(json.loads(json.dumps(theirs_config)), "the test", inner=not alone)
    assert back["target"] == stage["target"]
    own = {key: value for key, value in back["params"]["ddconfig"].items() if key != "dropout"}
    assert own.items() <= stage["params"]["ddconfig"].items()
    assert all(back["params"].get(key) == stage["params"].get(key) for key in ("embed_dim", "n_embed"))
    assert autoencoder.scale_factor(theirs_config) == 0.5


def clip(**sizes):
    config = transformers.CLIPTextConfig(vocab_size=49408, **sizes)
    with torch.device("meta"):
        weights = transformers.CLIPTextModel(config).state_dict()
    return config, {f"text_model.{name.removeprefix('text_model.')}": value for name, value in weights.items()}


def test_clip_of_version_1_has_all_names():
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    config, theirs = clip(**sizes, projection_dim=768)
    stage = text_encoder.ours({**config.to_dict(), "architectures": ["CLIPTextModel"]}, "the test", "folder")
    assert stage["target"].endswith("FrozenCLIPEmbedder") and stage["params"]["tokenizer"] == "folder"
    ours = text_encoder.without_unused(part("v1-inference", "cond_stage_model."))
    translation = Translation(text_encoder.layers(stage["target"]))
    assert shapes(translation.to_ours(theirs)) == shapes(ours)
    assert shapes(translation.to_theirs(ours)) == shapes(theirs)
    short = {name.removeprefix("text_model."): value for name, value in theirs.items()}
    assert shapes(translation.to_ours(short)) == shapes(ours)


def test_open_clip_of_version_2_has_all_names_but_those_of_the_last_block():
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
    config, theirs = clip(**sizes, hidden_act="gelu", projection_dim=512)
    stage = text_encoder.ours({**config.to_dict(), "architectures": ["CLIPTextModel"]}, "the test", None)
    assert stage["target"].endswith("FrozenOpenCLIPEmbedder") and stage["params"]["layer"] == "last"
    unused = ("model.text_projection", "model.logit_scale", "model.transformer.resblocks.23.")
    ours = {n: v for n, v in part("v2-inference-v", "cond_stage_model.").items() if not n.startswith(unused)}
    translation = Translation(text_encoder.layers(stage["target"]))
    assert shapes(translation.to_ours(theirs)) == shapes(ours)
    assert shapes(translation.to_theirs(ours)) == shapes(theirs)
    from ldm.config.instantiate import instantiate_from_config

    with torch.device("meta"):
        module = instantiate_from_config(stage)
    assert shapes(module.state_dict()) == shapes(ours)


def test_bert_of_the_text_model_has_all_names():
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    config = LDMBertConfig()
    with torch.device("meta"):
        theirs = LDMBertModel(config).state_dict()
    stage = text_encoder.ours({**config.to_dict(), "architectures": ["LDMBertModel"]}, "the test", "folder")
    sizes = {"n_embed": 1280, "n_layer": 32, "vocab_size": 30522, "max_seq_len": 77, "vocab": "folder"}
    assert stage["params"] == sizes
    ours = part("configs/latent-diffusion/txt2img-1p4B-eval.yaml", "cond_stage_model.")
    translation = Translation(text_encoder.layers(stage["target"], stage["params"]))
    assert shapes(translation.to_ours(theirs)) == shapes(ours)
    assert shapes(translation.to_theirs(ours)) == shapes(theirs)


@pytest.mark.parametrize("name", [*STABLE_DIFFUSION, *LATENT_DIFFUSION])
def test_schedule_is_the_same_after_both_directions(name, repo_root):
    params = read(repo_root, name)["params"]
    config = scheduler.theirs(params)
    diffusers.DDIMScheduler.from_config(dict(config))
    keys = ("timesteps", "linear_start", "linear_end", "parameterization")
    back = scheduler.ours(config, "the test")
    assert {key: back[key] for key in keys if key in back} == {key: params[key] for key in keys if key in params}


# -- translation -----------------------------------------------------------------------------------------------


def test_stacked_rows_alternate_after_each_head():
    layer = Layer("qkv.", ("q.", "k.", "v."), dims=1, heads=2)
    q, k, v = (torch.randn(6, 4) for _ in range(3))
    ours = Translation([layer]).to_ours({"q.weight": q, "k.weight": k, "v.weight": v})["qkv.weight"]
    assert ours.shape == (18, 4, 1)
    assert torch.equal(ours[:, :, 0], torch.cat([q[:3], k[:3], v[:3], q[3:], k[3:], v[3:]]))
    theirs = Translation([layer]).to_theirs({"qkv.weight": ours})
    assert torch.equal(theirs["q.weight"], q) and torch.equal(theirs["v.weight"], v)


def test_names_without_a_counterpart_stay():
    translation = Translation([Layer("a.", ("b.",)), Layer("qkv.", ("q.", "k.", "v."))])
    given = {"b.weight": torch.ones(1), "extra": torch.ones(2), "q.weight": torch.ones(3)}
    found = translation.to_ours(given)
    assert found.keys() == {"a.weight", "extra", "q.weight"}, "an incomplete stack is not dropped"
    with pytest.raises(KeyError):
        translation.to_theirs({"other": torch.ones(1)})


# -- what diffusers lacks --------------------------------------------------------------------------------------

SMALL = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [1, 2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resblock_updown": True}, '"resblock_updown" True; the U-Nets of diffusers have False'),
        ({"conv_resample": False}, '"conv_resample" False'),
        ({"dims": 3}, '"dims" 3'),
        ({"n_embed": 5}, '"n_embed" 5'),
        ({"num_classes": "continuous"}, "\"num_classes\" 'continuous'"),
        ({"num_heads": 4, "num_head_channels": -1}, "have different sizes"),
        ({"num_head_channels": 24}, "does not divide"),
        ({"use_spatial_transformer": True, "context_dim": [8, 16]}, "of different depth or context"),
        ({"use_spatial_transformer": True, "context_dim": 8, "disable_middle_self_attn": True}, "disable_middle"),
    ],
)
def test_network_that_diffusers_lacks_raises_user_error_with_the_reason(options, match):
    with pytest.raises(UserError, match=match):
        unet.theirs({**SMALL, **options})


@pytest.mark.parametrize("name", ["lsun_churches256", "inpainting_big"])
def test_published_networks_that_diffusers_lacks_raise_user_error(name, repo_root):
    params = read(repo_root, f"models/ldm/{name}/config.yaml")["params"]["unet_config"]["params"]
    with pytest.raises(UserError, match='"resblock_updown" True'):
        unet.theirs(params)
    with pytest.raises(UserError, match="the attention heads of the U-Net have different sizes"):
        unet.theirs({**params, "resblock_updown": False})


def test_first_stage_that_diffusers_lacks_raises_user_error_with_the_reason(repo_root):
    stage = read(repo_root, "models/first_stage_models/kl-f8/config.yaml")
    ddconfig = stage["params"]["ddconfig"]
    for changes, match in (
        ({"ddconfig": {**ddconfig, "tanh_out": True}}, '"tanh_out" True'),
        ({"ddconfig": {**ddconfig, "attn_type": "linear"}}, "softmax attention"),
        ({"ddconfig": {**ddconfig, "attn_type": "none", "attn_resolutions": [32]}}, "softmax attention"),
        ({"embed_dim": 3}, 'another "embed_dim" than "z_channels"'),
    ):
        with pytest.raises(UserError, match=match):
            autoencoder.theirs({**stage, "params": {**stage["params"], **changes}})
    with pytest.raises(UserError, match=r"no first stage like .*IdentityFirstStage;"):
        autoencoder.theirs({"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}})


def test_schedule_that_diffusers_lacks_raises_user_error():
    with pytest.raises(UserError, match='no "beta_schedule" like sqrt'):
        scheduler.theirs({"beta_schedule": "sqrt"})
    with pytest.raises(UserError, match=r'"cosine_s" 0.1'):
        scheduler.theirs({"beta_schedule": "cosine", "cosine_s": 0.1})
    given = scheduler.theirs({"given_betas": [0.1, 0.2]})
    assert given["trained_betas"] == [0.1, 0.2] and given["num_train_timesteps"] == 2
