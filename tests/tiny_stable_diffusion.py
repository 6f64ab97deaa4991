"""Tiny models with the structure of Stable Diffusion 1 and 2, and LoRA files for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import text_config, write_clip

WIDTH = 16  # channels of the context
LENGTH = 77


def v1_config(folder: Path, **params: Any) -> dict[str, Any]:
    """Return the configuration of a tiny Stable Diffusion 1, whose vocabulary is written to `folder`."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    settings = {"vocab_size": 56, "max_position_embeddings": LENGTH, "projection_dim": WIDTH, **sizes, **ids}
    tokenizer = str(write_clip(folder / "clip"))
    stage = {"text_config": settings, "tokenizer": tokenizer}
    return _config({"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": stage}, {}, params)


def v2_config(folder: Path, **params: Any) -> dict[str, Any]:
    """Return the same for Stable Diffusion 2, with half precision in its network as in the published files."""
    settings = {"vocab_size": 56, "context_length": LENGTH, "width": WIDTH, "heads": 2, "layers": 3, "embed_dim": 8}
    tokenizer = str(write_clip(folder / "clip"))
    stage = {"text_config": settings, "tokenizer": tokenizer, "freeze": True, "layer": "penultimate"}
    network = {"use_linear_in_transformer": True, "use_fp16": True, "num_head_channels": 16, "num_heads": -1}
    embedder = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": stage}
    return _config(embedder, network, {"parameterization": "v", **params})


def _config(cond_stage: dict[str, Any], network: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    shared = {
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "cond_stage_trainable": False,
        "cond_stage_config": cond_stage,
        "timesteps": 1000,
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "channels": 4,
        "scale_factor": 0.18215,
    }
    config = text_config(**{**shared, **params})
    unet, first_stage = (config["params"][f"{part}_config"]["params"] for part in ("unet", "first_stage"))
    unet |= {"context_dim": WIDTH, "in_channels": 4, "out_channels": 4, "legacy": False, **network}
    first_stage["embed_dim"] = first_stage["ddconfig"]["z_channels"] = 4
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
