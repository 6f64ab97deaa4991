"""A text-to-image model of a few thousand weights, as files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

VOCAB = Path(__file__).parents[1] / "data" / "emoji" / "vocab.txt"


def text_config(use_ema: bool = False, **params: Any) -> dict[str, Any]:
    """The configuration of a model of 16 × 16 pictures with latents of 8 × 8."""
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


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter small random values, those that start at zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def write_model(folder: Path, config: dict[str, Any] | None = None, **extra: Any) -> torch.nn.Module:
    """Write config.yaml and model.ckpt with random weights to `folder`; returns the model, in evaluation mode."""
    config = config or text_config()
    torch.manual_seed(0)
    model = randomise(instantiate_from_config(config)).eval()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": {"base_learning_rate": 1e-4, **config}}), folder / "config.yaml")
    torch.save({"state_dict": model.state_dict(), **extra}, folder / "model.ckpt")
    return model
