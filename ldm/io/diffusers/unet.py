"""U-Nets of diffusers: `UNet2DConditionModel` with transformers, and `UNet2DModel` with self-attention."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.io.diffusers.entries import attention_levels, check_fixed, multiples, one_value, required
from ldm.io.diffusers.translation import Layer

logger = logging.getLogger(__name__)
CONDITIONAL, UNCONDITIONAL = "UNet2DConditionModel", "UNet2DModel"
NORM_EPS = 1e-5
TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
# Attention by the name of a block, and the names for each of the two.
CONDITIONAL_BLOCKS = {
    "DownBlock2D": False,
    "UpBlock2D": False,
    "CrossAttnDownBlock2D": True,
    "CrossAttnUpBlock2D": True,
}
UNCONDITIONAL_BLOCKS = {"DownBlock2D": False, "UpBlock2D": False, "AttnDownBlock2D": True, "AttnUpBlock2D": True}
# Options of diffusers that the U-Net here implements with one value.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_num_groups": 32,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
}
FIXED_CONDITIONAL: dict[str, Any] = {
    "addition_embed_type": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
}
FIXED_UNCONDITIONAL: dict[str, Any] = {
    "add_attention": True,
    "attn_norm_num_groups": None,
    "downsample_type": "conv",
    "mid_block_type": "UNetMidBlock2D",
    "upsample_type": "conv",
}
# Options of the U-Net here that diffusers implements with one value, and their defaults here.
FIXED_OURS: dict[str, Any] = {
    "conv_resample": True,
    "dims": 2,
    "disable_middle_self_attn": False,
    "n_embed": None,
    "num_attention_blocks": None,
    "resblock_updown": False,
}
RESIDUAL_BLOCK = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}


# -- configuration -----------------------------------------------------------------------------------------------


def ours(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parameters of `UNetModel` for a configuration of diffusers.

    Args:
        config: entries of `unet/config.json`.
        where: the file, for messages.

    Raises:
        UserError: the network has parts that `UNetModel` lacks.
    """
    conditional = config.get("_class_name", CONDITIONAL) == CONDITIONAL
    _warn_other_eps(config, where)
    check_fixed(config, {**FIXED, **(FIXED_CONDITIONAL if conditional else FIXED_UNCONDITIONAL)}, where)
    channels = list(required(config, "block_out_channels", where))
    blocks = CONDITIONAL_BLOCKS if conditional else UNCONDITIONAL_BLOCKS
    attention = attention_levels(config, blocks, len(channels), where)
    params = {
        "image_size": one_value(config.get("sample_size") or 32),
        "in_channels": config.get("in_channels", 4 if conditional else 3),
        "out_channels": config.get("out_channels", 4 if conditional else 3),
        "model_channels": channels[0],
        "attention_resolutions": [2**i for i, has_attention in enumerate(attention) if has_attention],
        "num_res_blocks": one_value(config.get("layers_per_block", 2)),
        "channel_mult": multiples(channels, where),
        "legacy": False,
    }
    if config.get("resnet_time_scale_shift", "default") == "scale_shift":
        params["use_scale_shift_norm"] = True
    if config.get("num_class_embeds") is not None:
        params["num_classes"] = config["num_class_embeds"]
    return params | (_transformers(config, channels, where) if conditional else _self_attention(config))


def _warn_other_eps(config: Mapping[str, Any], where: str) -> None:
    """Log that the normalization differs, which changes outputs slightly."""
    eps = config.get("norm_eps", NORM_EPS)
    if eps != NORM_EPS:
        logger.warning('%s: "norm_eps" is %g; this package computes with %g', where, eps, NORM_EPS)


def _transformers(config: Mapping[str, Any], channels: Sequence[int], where: str) -> dict[str, Any]:
    """Return the parameters of transformers. `attention_head_dim` is the number of heads, in spite of its name."""
    heads = one_value(config.get("attention_head_dim", 8))
    params: dict[str, Any] = {"num_heads": heads}
    if not isinstance(heads, int):
        per_head = {width // count for width, count in zip(channels, heads, strict=True)}
        if len(per_head) > 1:
            raise UserError(f'{where}: "attention_head_dim" {heads} gives the levels heads of different sizes')
        params = {"num_head_channels": per_head.pop()}
    depth = one_value(config.get("transformer_layers_per_block", 1))
    width = one_value(config.get("cross_attention_dim", 1280))
    for key, value in (("transformer_layers_per_block", depth), ("cross_attention_dim", width)):
        if not isinstance(value, int):
            raise UserError(f'{where}: "{key}" differs between the levels, which is not supported')
    params |= {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": width}
    # The middle block of diffusers has self-attention in every case.
    only_cross = config.get("only_cross_attention", False)
    disabled = [only_cross] * len(channels) if isinstance(only_cross, bool) else list(only_cross)
    if any(disabled):
        params["disable_self_attentions"] = disabled
    if config.get("use_linear_projection", False):
        params["use_linear_in_transformer"] = True
    return params


def _self_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    per_head = config.get("attention_head_dim", 8)
    return {"num_heads": 1} if per_head is None else {"num_head_channels": per_head}


def theirs(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of diffusers for parameters of `UNetModel`.

    Raises:
        UserError: diffusers has no such network.
    """
    for key, value in FIXED_OURS.items():
        if params.get(key, value) != value:
            raise UserError(f'the U-Net has "{key}" {params[key]!r}; the U-Nets of diffusers have {value!r}')
    mult = params.get("channel_mult", (1, 2, 4, 8))
    channels = [params["model_channels"] * each for each in mult]
    attention = _attention(params)
    conditional = bool(params.get("use_spatial_transformer"))
    names = CONDITIONAL_BLOCKS if conditional else UNCONDITIONAL_BLOCKS
    down, up = ({flag: name for name, flag in names.items() if side in name} for side in ("Down", "Up"))
    blocks = one_value(params["num_res_blocks"])
    config = {
        "_class_name": CONDITIONAL if conditional else UNCONDITIONAL,
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": blocks if isinstance(blocks, int) else list(blocks),
        "down_block_types": [down[flag] for flag in attention],
        "up_block_types": [up[flag] for flag in reversed(attention)],
        "resnet_time_scale_shift": "scale_shift" if params.get("use_scale_shift_norm") else "default",
        "norm_eps": NORM_EPS,
        **FIXED,
    }
    classes = params.get("num_classes")
    if classes is not None and not isinstance(classes, int):
        raise UserError(f'the U-Net has "num_classes" {classes!r}; the U-Nets of diffusers have a number of classes')
    config["num_class_embeds"] = classes
    return config | (_their_transformers(params, channels) if conditional else _their_self_attention(params, channels))


def _their_transformers(params: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    per_head = params.get("num_head_channels", -1)
    if per_head != -1 and any(width % per_head for width in channels):
        raise UserError(f'the U-Net has "num_head_channels" {per_head}, which does not divide {channels}')
    depth, width = one_value(params.get("transformer_depth", 1)), one_value(params["context_dim"])
    if not isinstance(depth, int) or not isinstance(width, int):
        raise UserError("the U-Net has transformers of different depth or context, which diffusers lacks")
    disabled = list(params.get("disable_self_attentions") or [])
    return {
        "attention_head_dim": params["num_heads"] if per_head == -1 else [width // per_head for width in channels],
        "cross_attention_dim": width,
        "transformer_layers_per_block": depth,
        "only_cross_attention": disabled if any(disabled) else False,
        "use_linear_projection": bool(params.get("use_linear_in_transformer", False)),
    }


def _their_self_attention(params: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    per_head = params.get("num_head_channels", -1)
    if per_head == -1:
        upsample = params.get("num_heads_upsample", -1)
        widths = {
            width // params["num_heads"] for width, flag in zip(channels, _attention(params), strict=True) if flag
        }
        widths.add(channels[-1] // params["num_heads"])
        if len(widths) > 1 or upsample not in (-1, params["num_heads"]):
            raise UserError("the attention heads of the U-Net have different sizes; those of diffusers have one size")
        per_head = widths.pop()
    elif any(width % per_head for width in channels):
        raise UserError(f'the U-Net has "num_head_channels" {per_head}, which does not divide {channels}')
    return {"attention_head_dim": per_head, **FIXED_UNCONDITIONAL}


def _attention(params: Mapping[str, Any]) -> list[bool]:
    levels = len(params.get("channel_mult", (1, 2, 4, 8)))
    return [2**i in params["attention_resolutions"] for i in range(levels)]


# -- weights -----------------------------------------------------------------------------------------------------


def layers(params: Mapping[str, Any]) -> list[Layer]:
    """Return the layers of the `UNetModel` with these parameters."""
    mult = params.get("channel_mult", (1, 2, 4, 8))
    last = len(mult) - 1
    attention = _attention(params)
    channels = [params["model_channels"] * each for each in mult]
    blocks = params["num_res_blocks"]
    blocks = [blocks] * len(mult) if isinstance(blocks, int) else list(blocks)
    found = [
        Layer("input_blocks.0.0.", ("conv_in.",)),
        Layer("time_embed.0.", ("time_embedding.linear_1.",)),
        Layer("time_embed.2.", ("time_embedding.linear_2.",)),
        Layer("label_emb.", ("class_embedding.",)),
        *_residual_block("middle_block.0.", "mid_block.resnets.0."),
        *_attention_block("middle_block.1.", "mid_block.attentions.0.", params, channels[-1]),
        *_residual_block("middle_block.2.", "mid_block.resnets.1."),
        Layer("out.0.", ("conv_norm_out.",)),
        Layer("out.2.", ("conv_out.",)),
    ]
    index = 1
    for i in range(len(mult)):
        for j in range(blocks[i]):
            found += _residual_block(f"input_blocks.{index}.0.", f"down_blocks.{i}.resnets.{j}.")
            if attention[i]:
                theirs = f"down_blocks.{i}.attentions.{j}."
                found += _attention_block(f"input_blocks.{index}.1.", theirs, params, channels[i])
            index += 1
        if i != last:
            found.append(Layer(f"input_blocks.{index}.0.op.", (f"down_blocks.{i}.downsamplers.0.conv.",)))
            index += 1
    index = 0
    for i in range(len(mult)):
        level = last - i
        for j in range(blocks[level] + 1):
            found += _residual_block(f"output_blocks.{index}.0.", f"up_blocks.{i}.resnets.{j}.")
            if attention[level]:
                theirs = f"up_blocks.{i}.attentions.{j}."
                found += _attention_block(f"output_blocks.{index}.1.", theirs, params, channels[level])
            if j == blocks[level] and level:
                ours = f"output_blocks.{index}.{2 if attention[level] else 1}.conv."
                found.append(Layer(ours, (f"up_blocks.{i}.upsamplers.0.conv.",)))
            index += 1
    return found


def _residual_block(ours: str, theirs: str) -> list[Layer]:
    return [Layer(ours + part, (theirs + other,)) for part, other in RESIDUAL_BLOCK.items()]


def _attention_block(ours: str, theirs: str, params: Mapping[str, Any], channels: int) -> list[Layer]:
    """Return the layers of a transformer, whose names are the same, or of self-attention."""
    if params.get("use_spatial_transformer"):
        return [Layer(ours, (theirs,))]
    per_head = params.get("num_head_channels", -1)
    heads = params["num_heads"] if per_head == -1 else channels // per_head
    heads = 1 if params.get("use_new_attention_order") else heads
    return [
        Layer(f"{ours}norm.", (f"{theirs}group_norm.",)),
        Layer(
            f"{ours}qkv.",
            tuple(f"{theirs}to_{part}." for part in "qkv"),
            tuple(f"{theirs}{part}." for part in ("query", "key", "value")),
            dims=1,
            heads=heads,
        ),
        Layer(f"{ours}proj_out.", (f"{theirs}to_out.0.",), (f"{theirs}proj_attn.",), dims=1),
    ]
