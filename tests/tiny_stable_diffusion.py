"""Tiny models with the structure of Stable Diffusion 1 and 2, and LoRA files for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import text_config, write_clip

WIDTH = 16  # channels of the context
LENGTH = 77
SCHEDULE = {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012}  # as published


def stable_diffusion_config(version: int = 1, vocabulary: Path | None = None, **params: Any) -> dict[str, Any]:
    """Return the configuration of a text-to-image model of 16 × 16 pixels with latents of 4 × 8 × 8.

    Args:
        version: 1 (CLIP) or 2 (OpenCLIP).
        vocabulary: folder of a vocabulary of 56 tokens, see `write_clip`.
        **params: parameters of the model that replace others.
    """
    encoder: dict[str, Any] = {"tokenizer": str(vocabulary or "openai/clip-vit-large-patch14")}
    if version == 1:
        sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        settings = {"vocab_size": 56, "max_position_embeddings": LENGTH, "projection_dim": WIDTH, **sizes, **ids}
        encoder |= {"text_config": settings}
        target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    else:
        sizes = {"width": WIDTH, "heads": 2, "layers": 3, "embed_dim": 8}
        encoder |= {"text_config": {"vocab_size": 56, "context_length": LENGTH, **sizes}, "layer": "penultimate"}
        target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    shared = {
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "cond_stage_trainable": False,
        "cond_stage_config": {"target": target, "params": encoder},
        "channels": 4,
        "scale_factor": 0.18215,
    }
    config = text_config(**{**shared, **params})
    unet, first_stage = (config["params"][f"{part}_config"]["params"] for part in ("unet", "first_stage"))
    unet |= {"context_dim": WIDTH, "in_channels": 4, "out_channels": 4, "legacy": False}
    if version == 2:
        unet |= {"use_linear_in_transformer": True, "num_head_channels": 16, "num_heads": -1}
    first_stage["embed_dim"] = first_stage["ddconfig"]["z_channels"] = 4
    return config


def text_inpainting_config(version: int = 1, vocabulary: Path | None = None, **params: Any) -> dict[str, Any]:
    """Return the same for a model that fills masked images by a text."""
    params = {"conditioning_key": "hybrid", "finetune_keys": None, **params}
    config = stable_diffusion_config(version, vocabulary, **params)
    config["params"]["unet_config"]["params"]["in_channels"] = 9
    return {**config, "target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"}


def upscaler_config(vocabulary: Path | None = None, **params: Any) -> dict[str, Any]:
    """Return the same for a model that doubles the sides of images by a text."""
    low_scale = {
        "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
        "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 350},
    }
    params = {"conditioning_key": "hybrid-adm", "low_scale_config": low_scale, "low_scale_key": "lr", **params}
    config = stable_diffusion_config(2, vocabulary, **{"parameterization": "v", **params})
    config["params"]["unet_config"]["params"].update(in_channels=7, num_classes=1000)
    return {**config, "target": "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion"}


def v1_config(folder: Path, **params: Any) -> dict[str, Any]:
    """Return the configuration of a tiny Stable Diffusion 1, whose vocabulary is written to `folder`."""
    return stable_diffusion_config(1, write_clip(folder / "clip"), **{**SCHEDULE, **params})


def v2_config(folder: Path, **params: Any) -> dict[str, Any]:
    """Return the same for Stable Diffusion 2, with half precision in its network as in the published files."""
    config = stable_diffusion_config(2, write_clip(folder / "clip"), **{**SCHEDULE, "parameterization": "v", **params})
    config["params"]["unet_config"]["params"]["use_fp16"] = True
    return config


def lora_factors(outputs: int, inputs: int, kernel: tuple[int, ...] = (), rank: int = 2, seed: int = 0) -> Any:
    """Return random factors (down, up) of an update, and their product (outputs, inputs, *kernel)."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, *kernel, generator=generator)
    up = torch.randn(outputs, rank, *[1] * len(kernel), generator=generator)
    product = (up.flatten(1) @ down.flatten(1)).reshape(outputs, inputs, *kernel)
    return down, up, product


def write_lora(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write the weights of a LoRA to a safetensors file; return its path."""
    save_file({name: value.clone() for name, value in weights.items()}, path, metadata)
    return path
