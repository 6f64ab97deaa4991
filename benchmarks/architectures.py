"""Networks to measure, each of this project and of diffusers, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from ldm.config.instantiate import instantiate_from_config
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.openaimodel import UNetModel

LATENT_CHANNELS = 4
TEXT_LEVELS = (True, True, True, False)  # levels with cross-attention to the text


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks; the defaults are those of the published text-to-image model of 1.45 billion parameters."""

    width: int = 320
    context: tuple[int, int] = (77, 1280)
    latent: int = 32
    decoder_width: int = 128
    unconditional_width: int = 128
    unconditional_size: int = 64


TINY = Sizes(width=32, context=(7, 24), latent=8, decoder_width=32, unconditional_width=32, unconditional_size=16)


STABLE_DIFFUSION = Sizes(context=(77, 768), latent=64)  # version 1, 512 × 512 pixels


def sizes(tiny: bool, stable_diffusion: bool = False) -> Sizes:
    """Return the published sizes, those of Stable Diffusion 1, or tiny ones."""
    if tiny:
        return TINY
    return STABLE_DIFFUSION if stable_diffusion else Sizes()


def text_unet_params(size: Sizes) -> dict[str, Any]:
    """Return the arguments of the text-conditional U-Net (872 million parameters), as in its configuration."""
    return {
        "image_size": size.latent,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "model_channels": size.width,
        "num_res_blocks": 2,
        "attention_resolutions": [1, 2, 4],
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "context_dim": size.context[1],
        "legacy": False,
    }


def text_unet(size: Sizes) -> UNetModel:
    """Return the text-conditional U-Net."""
    return random_weights(UNetModel(**text_unet_params(size)))


def diffusers_text_unet(size: Sizes) -> Any:
    """Return the text-conditional U-Net of diffusers."""
    kinds = ["CrossAttn" if attends else "" for attends in TEXT_LEVELS]
    return diffusers.UNet2DConditionModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=[factor * size.width for factor in (1, 2, 4, 4)],
        layers_per_block=2,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=8,  # the number of heads, in spite of its name
        cross_attention_dim=size.context[1],
    )


def autoencoder_params(size: Sizes) -> dict[str, Any]:
    """Return the arguments of the autoencoder with factor 8."""
    return {
        "embed_dim": LATENT_CHANNELS,
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": True,
            "z_channels": LATENT_CHANNELS,
            "resolution": 8 * size.latent,
            "in_channels": 3,
            "out_ch": 3,
            "ch": size.decoder_width,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
        },
    }


def autoencoder(size: Sizes) -> AutoencoderKL:
    """Return the autoencoder with factor 8."""
    return random_weights(AutoencoderKL(**autoencoder_params(size)))


def diffusers_autoencoder(size: Sizes) -> Any:
    """Return the autoencoder with factor 8 of diffusers."""
    return diffusers.AutoencoderKL(
        block_out_channels=[factor * size.decoder_width for factor in (1, 2, 4, 4)],
        layers_per_block=2,
        down_block_types=4 * ["DownEncoderBlock2D"],
        up_block_types=4 * ["UpDecoderBlock2D"],
        latent_channels=LATENT_CHANNELS,
    )


def unconditional_params(size: Sizes) -> dict[str, Any]:
    """Return the arguments of the unconditional U-Net of the published face models, narrower: 89 million parameters."""
    return {
        "image_size": size.unconditional_size,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": size.unconditional_width,
        "num_res_blocks": 2,
        "attention_resolutions": [8, 4, 2],
        "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 32,
    }


def diffusers_unconditional_unet(size: Sizes) -> Any:
    """Return the unconditional U-Net of diffusers."""
    return diffusers.UNet2DModel(
        sample_size=size.unconditional_size,
        block_out_channels=[factor * size.unconditional_width for factor in (1, 2, 3, 4)],
        layers_per_block=2,
        down_block_types=["DownBlock2D", *3 * ["AttnDownBlock2D"]],
        up_block_types=[*3 * ["AttnUpBlock2D"], "UpBlock2D"],
        attention_head_dim=32,
    )


def latent_diffusion(size: Sizes) -> Any:
    """Return the text-to-image model without its text encoder: the conditioning is the output of that encoder."""
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "image_size": size.latent,
            "channels": LATENT_CHANNELS,
            "conditioning_key": "crossattn",
            "scale_factor": 0.18215,
            "use_ema": False,
            "unet_config": {"target": target, "params": text_unet_params(size)},
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": autoencoder_params(size),
            },
            "cond_stage_config": {"target": "torch.nn.Identity"},
        },
    }
    return random_weights(instantiate_from_config(config))


@torch.no_grad()
def random_weights(module: nn.Module) -> Any:
    """Fill weights that are initialised with zeros, which would hide differences; return `module`."""
    for parameter in module.parameters():
        if not parameter.is_meta and not parameter.any():
            parameter.normal_(std=0.02)
    return module
