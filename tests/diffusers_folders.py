"""Small random models that diffusers writes as folders, to be read here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tiny_models import VOCAB, randomise, write_clip

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRID = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def make_vae(**options: Any) -> Any:
    """Return a random `AutoencoderKL` with latents of 4 channels at a quarter of the size."""
    torch.manual_seed(1)
    channels = options.pop("block_out_channels", (32, 64, 64))
    settings = {
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 16,
    }
    return randomise(diffusers.AutoencoderKL(**{**settings, **options})).eval()


def make_vqvae(**options: Any) -> Any:
    """Return a random `VQModel` with latents of 3 channels at half the size."""
    torch.manual_seed(1)
    settings = {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "latent_channels": 3,
        "sample_size": 16,
        "num_vq_embeddings": 20,
        "scaling_factor": 0.5,
    }
    return randomise(diffusers.VQModel(**{**settings, **options})).eval()


def make_conditional_unet(**options: Any) -> Any:
    """Return a random U-Net with transformers on the first of two levels."""
    torch.manual_seed(2)
    settings = {
        "sample_size": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
    }
    return randomise(diffusers.UNet2DConditionModel(**{**settings, **options})).eval()


def make_unet(channels: int = 3, **options: Any) -> Any:
    """Return a random U-Net with self-attention on the second of two levels."""
    torch.manual_seed(2)
    settings = {
        "sample_size": 8,
        "in_channels": channels,
        "out_channels": 3,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 16,
    }
    return randomise(diffusers.UNet2DModel(**{**settings, **options})).eval()


def make_text_encoder(activation: str = "quick_gelu", layers: int = 2) -> Any:
    """Return a random text model of CLIP, or with "gelu" of OpenCLIP, for the tokens of `write_clip`."""
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=56,
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return randomise(transformers.CLIPTextModel(config)).eval()


def make_bert() -> Any:
    """Return a random text encoder of the latent diffusion models."""
    torch.manual_seed(3)
    config = LDMBertConfig(
        vocab_size=2500, d_model=16, encoder_layers=2, encoder_ffn_dim=64, max_position_embeddings=12
    )
    return randomise(LDMBertModel(config)).eval()


def write_stable_diffusion(folder: Path, **parts: Any) -> Any:
    """Write a text-to-image pipeline to `folder`; return it."""
    pipeline = diffusers.StableDiffusionPipeline(
        vae=parts.pop("vae", None) or make_vae(),
        unet=parts.pop("unet", None) or make_conditional_unet(),
        text_encoder=parts.pop("text_encoder", None) or make_text_encoder(),
        tokenizer=clip_tokenizer(folder.parent / "clip"),
        scheduler=parts.pop("scheduler", None) or diffusers.PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def write_inpainting(folder: Path) -> Any:
    """Write an in-painting pipeline to `folder`; return it."""
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        vae=make_vae(),
        unet=make_conditional_unet(in_channels=9),
        text_encoder=make_text_encoder(),
        tokenizer=clip_tokenizer(folder.parent / "clip"),
        scheduler=diffusers.DDIMScheduler(**BETAS, **GRID),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def write_upscaler(folder: Path) -> Any:
    """Write an upscaling pipeline to `folder`; return it."""
    unet = make_conditional_unet(
        in_channels=7, num_class_embeds=40, only_cross_attention=(True, False), use_linear_projection=True
    )
    pipeline = diffusers.StableDiffusionUpscalePipeline(
        vae=make_vae(scaling_factor=0.08333),
        unet=unet,
        text_encoder=make_text_encoder("gelu"),
        tokenizer=clip_tokenizer(folder.parent / "clip"),
        low_res_scheduler=diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear"),
        scheduler=diffusers.DDIMScheduler(**BETAS, **GRID, prediction_type="v_prediction"),
        max_noise_level=30,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def write_unconditional(folder: Path) -> Any:
    """Write an unconditional latent diffusion model to `folder`; return it."""
    pipeline = diffusers.LDMPipeline(make_vqvae(), make_unet(), diffusers.DDIMScheduler(**BETAS, **GRID))
    pipeline.save_pretrained(folder)
    return pipeline


def write_super_resolution(folder: Path) -> Any:
    """Write a super-resolution model to `folder`; return it."""
    scheduler = diffusers.DDIMScheduler(**BETAS, **GRID)
    pipeline = diffusers.LDMSuperResolutionPipeline(make_vqvae(), make_unet(6), scheduler)
    pipeline.save_pretrained(folder)
    return pipeline


def write_text_ldm(folder: Path) -> Any:
    """Write a latent diffusion model of texts to `folder`; return it."""
    pipeline = diffusers.LDMTextToImagePipeline(
        vqvae=make_vae(),
        bert=make_bert(),
        tokenizer=transformers.BertTokenizer(str(VOCAB)),
        unet=make_conditional_unet(),
        scheduler=diffusers.DDIMScheduler(**BETAS, **GRID),
    )
    pipeline.save_pretrained(folder)
    return pipeline


def clip_tokenizer(folder: Path) -> Any:
    """Return a tokenizer of a few words, whose files are in `folder`."""
    return transformers.CLIPTokenizer.from_pretrained(str(write_clip(folder)), model_max_length=77)
