"""First stages of diffusers: `AutoencoderKL` and `VQModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import UserError
from ldm.io.diffusers.entries import attention_levels, check_fixed, multiples, required
from ldm.io.diffusers.translation import Layer

KL, VQ = "AutoencoderKL", "VQModel"
TARGETS = {KL: "ldm.models.autoencoder.AutoencoderKL", VQ: "ldm.models.autoencoder.VQModel"}
# Within a diffusion model, the latents of a first stage with a codebook are those before quantization.
INNER_TARGETS = {**TARGETS, VQ: "ldm.models.autoencoder.VQModelInterface"}
SCALING_FACTOR = 0.18215  # diffusers' default
BLOCKS = {
    "DownEncoderBlock2D": False,
    "UpDecoderBlock2D": False,
    "AttnDownEncoderBlock2D": True,
    "AttnUpDecoderBlock2D": True,
}
FIXED: dict[str, Any] = {"act_fn": "silu", "norm_num_groups": 32}
FIXED_KL: dict[str, Any] = {
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
FIXED_VQ: dict[str, Any] = {"lookup_from_codebook": None, "norm_type": "group"}
# Options of the encoder and decoder here that diffusers implements with one value.
FIXED_OURS: dict[str, Any] = {"give_pre_end": False, "resamp_with_conv": True, "tanh_out": False}
RESIDUAL_BLOCK = {**{f"{name}.": f"{name}." for name in ("norm1", "conv1", "norm2", "conv2")}} | {
    "nin_shortcut.": "conv_shortcut."
}
DIFFUSERS_PREFIXES = ("encoder.down_blocks.", "encoder.mid_block.", "decoder.up_blocks.", "decoder.mid_block.")


# -- configuration -----------------------------------------------------------------------------------------------


def ours(config: Mapping[str, Any], where: str, inner: bool = False) -> dict[str, Any]:
    """Return target and parameters of a first stage for a configuration of diffusers.

    Args:
        config: entries of `vae/config.json` or `vqvae/config.json`.
        where: the file, for messages.
        inner: it is the first stage of a diffusion model.

    Raises:
        UserError: the network has parts that the first stages here lack.
    """
    kind = config.get("_class_name", KL)
    if kind not in TARGETS:
        raise UserError(f'{where}: "{kind}" is not supported; supported first stages are {" and ".join(TARGETS)}')
    check_fixed(config, {**FIXED, **(FIXED_KL if kind == KL else FIXED_VQ)}, where)
    channels = list(required(config, "block_out_channels", where))
    attention = attention_levels(config, BLOCKS, len(channels), where)
    latent = config.get("latent_channels", 4 if kind == KL else 3)
    resolution = config.get("sample_size", 32)
    ddconfig = {
        "double_z": kind == KL,
        "z_channels": latent,
        "resolution": resolution,
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": channels[0],
        "ch_mult": multiples(channels, where),
        "num_res_blocks": config.get("layers_per_block", 1),
        "attn_resolutions": [resolution // 2**i for i, has_attention in enumerate(attention) if has_attention],
        "dropout": 0.0,
    }
    if not config.get("mid_block_add_attention", True):
        if any(attention):
            raise UserError(f"{where}: attention on a level but not in the middle is not supported")
        ddconfig["attn_type"] = "none"
    params: dict[str, Any] = {"ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    if kind == KL:
        params["embed_dim"] = latent
    else:
        params["embed_dim"] = config.get("vq_embed_dim") or latent
        params["n_embed"] = config.get("num_vq_embeddings", 256)
    return {"target": (INNER_TARGETS if inner else TARGETS)[kind], "params": params}


def scale_factor(config: Mapping[str, Any]) -> float:
    """Return the factor from latents of the first stage to those of the diffusion model."""
    return config.get("scaling_factor", SCALING_FACTOR)


def theirs(stage: Mapping[str, Any], scale_factor: float = 1.0) -> dict[str, Any]:
    """Return the configuration of diffusers for target and parameters of a first stage.

    Raises:
        UserError: diffusers has no such network.
    """
    kinds = {target: kind for targets in (TARGETS, INNER_TARGETS) for kind, target in targets.items()}
    kind = kinds.get(stage["target"])
    if kind is None:
        raise UserError(f"diffusers has no first stage like {stage['target']}; it has {' and '.join(TARGETS)}")
    params = stage["params"]
    ddconfig = params["ddconfig"]
    for key, value in FIXED_OURS.items():
        if ddconfig.get(key, value) != value:
            raise UserError(f'the first stage has "{key}" {ddconfig[key]!r}; those of diffusers have {value!r}')
    attn_type = "linear" if ddconfig.get("use_linear_attn") else ddconfig.get("attn_type", "vanilla")
    levels = _attention(ddconfig)
    if attn_type == "linear" or (attn_type == "none" and any(levels)):
        raise UserError(f'the first stage has "attn_type" {attn_type!r} on its levels; diffusers has softmax attention')
    if kind == KL and params["embed_dim"] != ddconfig["z_channels"]:
        raise UserError('the first stage has another "embed_dim" than "z_channels"; in diffusers both are equal')
    down, up = ({flag: name for name, flag in BLOCKS.items() if side in name} for side in ("Down", "Up"))
    config = {
        "_class_name": kind,
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": [down[flag] for flag in levels],
        "up_block_types": [up[flag] for flag in reversed(levels)],
        "block_out_channels": [ddconfig["ch"] * each for each in ddconfig["ch_mult"]],
        "layers_per_block": ddconfig["num_res_blocks"],
        "latent_channels": ddconfig["z_channels"],
        "sample_size": ddconfig["resolution"],
        "scaling_factor": scale_factor,
        "mid_block_add_attention": attn_type != "none",
        **FIXED,
    }
    if kind == VQ:
        config |= {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"], "norm_type": "group"}
    return config


def _attention(ddconfig: Mapping[str, Any]) -> list[bool]:
    resolution = ddconfig["resolution"]
    return [resolution // 2**i in ddconfig["attn_resolutions"] for i in range(len(ddconfig["ch_mult"]))]


# -- weights -----------------------------------------------------------------------------------------------------


def layers(ddconfig: Mapping[str, Any]) -> list[Layer]:
    """Return the layers of the first stage with this `ddconfig`."""
    levels, blocks = len(ddconfig["ch_mult"]), ddconfig["num_res_blocks"]
    found = [
        Layer("quant_conv.", ("quant_conv.",)),
        Layer("post_quant_conv.", ("post_quant_conv.",)),
        Layer("quantize.embedding.", ("quantize.embedding.",)),
    ]
    for side in ("encoder.", "decoder."):
        found += [Layer(side + name, (side + name,)) for name in ("conv_in.", "conv_out.")]
        found += [
            Layer(f"{side}norm_out.", (f"{side}conv_norm_out.",)),
            *_residual_block(f"{side}mid.block_1.", f"{side}mid_block.resnets.0."),
            *_attention_block(f"{side}mid.attn_1.", f"{side}mid_block.attentions.0."),
            *_residual_block(f"{side}mid.block_2.", f"{side}mid_block.resnets.1."),
        ]
    for i in range(levels):
        ours, theirs = f"encoder.down.{i}.", f"encoder.down_blocks.{i}."
        for j in range(blocks):
            found += _residual_block(f"{ours}block.{j}.", f"{theirs}resnets.{j}.")
            found += _attention_block(f"{ours}attn.{j}.", f"{theirs}attentions.{j}.")
        found.append(Layer(f"{ours}downsample.conv.", (f"{theirs}downsamplers.0.conv.",)))
        ours, theirs = f"decoder.up.{levels - 1 - i}.", f"decoder.up_blocks.{i}."
        for j in range(blocks + 1):
            found += _residual_block(f"{ours}block.{j}.", f"{theirs}resnets.{j}.")
            found += _attention_block(f"{ours}attn.{j}.", f"{theirs}attentions.{j}.")
        found.append(Layer(f"{ours}upsample.conv.", (f"{theirs}upsamplers.0.conv.",)))
    return found


def _residual_block(ours: str, theirs: str) -> list[Layer]:
    return [Layer(ours + part, (theirs + other,)) for part, other in RESIDUAL_BLOCK.items()]


def _attention_block(ours: str, theirs: str) -> list[Layer]:
    """Return the layers of attention, which are convolutions of 1 x 1 here and linear layers in diffusers."""
    older = {"q.": "query.", "k.": "key.", "v.": "value.", "proj_out.": "proj_attn."}
    newer = {"q.": "to_q.", "k.": "to_k.", "v.": "to_v.", "proj_out.": "to_out.0."}
    return [
        Layer(f"{ours}norm.", (f"{theirs}group_norm.",)),
        *(Layer(ours + part, (theirs + newer[part],), (theirs + older[part],), dims=2) for part in newer),
    ]
