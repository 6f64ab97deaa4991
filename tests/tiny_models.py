"""Tiny models and a tiny CLIP, of a few thousand weights each, as configurations and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.config.instantiate import instantiate_from_config

EMOJI = Path(__file__).parents[1] / "data" / "emoji"
VOCAB, EMOJI_CLASSES = EMOJI / "vocab.txt", EMOJI / "class_names.txt"


def text_config(use_ema: bool = False, **params: Any) -> dict[str, Any]:
    """Return the configuration of a text-to-image model of 16 × 16 pixels with latents of 8 × 8."""
    first_stage = {
        "embed_dim": 3,
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": True,
            "z_channels": 3,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
    unet = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 32,
    }
    cond_stage = {"n_embed": 32, "n_layer": 1, "vocab_size": 2500, "max_seq_len": 16, "vocab": str(VOCAB)}
    model_params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 100,
        "first_stage_key": "image",
        "cond_stage_key": "caption",
        "image_size": 8,
        "channels": 3,
        "cond_stage_trainable": True,
        "conditioning_key": "crossattn",
        "use_ema": use_ema,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": cond_stage},
        **params,
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model_params}


def layout_config(**params: Any) -> dict[str, Any]:
    """Return the same for a model conditioned on layouts of at most three boxes of 299 classes."""
    embedder = {"n_embed": 32, "n_layer": 1, "vocab_size": 300, "max_seq_len": 11, "use_tokenizer": False}
    cond_stage = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": embedder}
    return text_config(cond_stage_key="coordinates_bbox", cond_stage_config=cond_stage, **params)


def map_config(labels: int = 182, **params: Any) -> dict[str, Any]:
    """Return the same for a model conditioned on label maps, which are concatenated to the input."""
    rescaler = {"n_stages": 1, "in_channels": labels, "out_channels": 3}
    cond_stage = {"target": "ldm.modules.encoders.modules.SpatialRescaler", "params": rescaler}
    config = text_config(
        cond_stage_key="segmentation", cond_stage_config=cond_stage, conditioning_key="concat", **params
    )
    unet = config["params"]["unet_config"]["params"]
    unet.update(in_channels=6, use_spatial_transformer=False, context_dim=None)
    return config


def class_config(n_classes: int = 11, **params: Any) -> dict[str, Any]:
    """Return the same for a class-conditional model."""
    stage = {"embed_dim": 32, "n_classes": n_classes, "key": "class_label"}
    embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": stage}
    return text_config(**{"cond_stage_key": "class_label", "cond_stage_config": embedder, **params})


def unconditional_config(**params: Any) -> dict[str, Any]:
    """Return the same for an unconditional model."""
    config = text_config(cond_stage_config="__is_unconditional__", **params)
    config["params"] |= {"conditioning_key": None, "cond_stage_trainable": False}
    _remove_cross_attention(config["params"]["unet_config"]["params"])
    return config


def pixel_config(**params: Any) -> dict[str, Any]:
    """Return the configuration of an unconditional pixel-space model of 8 × 8 pixels."""
    unet = text_config()["params"]["unet_config"]
    _remove_cross_attention(unet["params"])
    model_params = {"timesteps": 100, "image_size": 8, "channels": 3, "use_ema": False, "unet_config": unet}
    return {"target": "ldm.models.diffusion.ddpm.DDPM", "params": {**model_params, **params}}


def _remove_cross_attention(unet: dict[str, Any]) -> None:
    for key in ("use_spatial_transformer", "transformer_depth", "context_dim"):
        del unet[key]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Add small random values to every parameter, also to those that are initialised with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def write_model(folder: Path, config: dict[str, Any] | None = None, **extra: Any) -> torch.nn.Module:
    """Write config.yaml and model.ckpt with random weights to `folder`; return the model, in evaluation mode."""
    config = config or text_config()
    torch.manual_seed(0)
    model = randomise(instantiate_from_config(config)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": {"base_learning_rate": 1e-4, **config}}), folder / "config.yaml")
    torch.save({"state_dict": model.state_dict(), **extra}, folder / "model.ckpt")
    return model


def write_clip(folder: Path, tokens: int = 77, width: int = 10) -> Path:
    """Write a random CLIP for images of 8 × 8 pixels and captions of letters and the word "cat"; return `folder`.

    Args:
        folder: where the files go.
        tokens: largest length of a caption.
        width: channels of the joint space of captions and images.
    """
    import transformers

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config={**size, **ids, "vocab_size": 56, "max_position_embeddings": tokens},
        vision_config={**size, "image_size": 8, "patch_size": 4},
        projection_dim=width,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters), "ca", "cat</w>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder


def concat_config(cond_stage_key: str, channels: int, cond_stage: Any, **params: Any) -> dict[str, Any]:
    """Return the same for a model whose conditioning is a map of `channels` that is concatenated to the input."""
    config = text_config(cond_stage_key=cond_stage_key, conditioning_key="concat", cond_stage_trainable=False, **params)
    unet = config["params"]["unet_config"]["params"]
    _remove_cross_attention(unet)
    unet["in_channels"] = 3 + channels
    config["params"]["cond_stage_config"] = cond_stage
    return config


def inpainting_config(**params: Any) -> dict[str, Any]:
    """Return the same for an in-painting model of images whose sides are multiples of 4."""
    return concat_config("masked_image", 4, "__is_first_stage__", **params)


def superresolution_config(**params: Any) -> dict[str, Any]:
    """Return the same for a super-resolution model that doubles the sides of images."""
    return concat_config("LR_image", 3, {"target": "torch.nn.Identity"}, **params)


def retrieval_config(width: int = 10, **params: Any) -> dict[str, Any]:
    """Return the same for a retrieval-augmented model, conditioned on CLIP embeddings of `width` channels."""
    config = text_config(cond_stage_config={"target": "torch.nn.Identity"}, cond_stage_key="nix", **params)
    config["params"]["unet_config"]["params"]["context_dim"] = width
    config["params"]["cond_stage_trainable"] = False
    return config


def make_model(config: dict[str, Any], name: str = "tiny") -> torch.nn.Module:
    """Return a model with random weights, in evaluation mode and without gradients."""
    torch.manual_seed(0)
    model = randomise(instantiate_from_config(config)).eval().requires_grad_(False)
    model.name = name
    if hasattr(getattr(model, "cond_stage_model", None), "has_weights"):
        model.cond_stage_model.has_weights = True  # the random ones
    return model
