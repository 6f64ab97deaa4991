"""Recognise files of weights that are not a model of this package, by the names and shapes of their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ldm.errors import UserError
from ldm.io.checkpoint.names import printable

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Kind:
    """Kind of weights.

    Attributes:
        what: its name with an article, for messages.
        advice: what to do with such a file.
    """

    what: str
    advice: str = "this package does not implement it"


LORA_ADVICE = "give it with --lora beside a model"
EMBEDDING = Kind("an embedding of a textual inversion", "give it with --embedding beside a model")
FIRST_STAGE = Kind("a first stage alone", "give it with --vae beside a model, or with --config to reconstruct images")
# Parts of names, and the kind of a file in which one occurs. The first match counts.
LORA_NAME = r"(\.lora_(down|up|mid|A|B)\.|[._]lora\.(down|up)\.|\.lora_linear_layer\.)"
MARKS: tuple[tuple[str, Kind], ...] = (
    (r"\.(hada_w1_a|hada_w2_a)$", Kind("a LoHa, a low-rank update by Hadamard products")),
    (r"\.lokr_w[12]", Kind("a LoKr, a low-rank update by Kronecker products")),
    (LORA_NAME, Kind("a LoRA", LORA_ADVICE)),
    (r"^(string_to_param|emb_params$|clip_[lg]$)", EMBEDDING),
    (
        r"(^|\.)(control_model\.|controlnet_cond_embedding\.|zero_convs\.\d|input_hint_block\.\d)",
        Kind("a ControlNet"),
    ),
    (r"(^|\.)(ip_adapter\.|image_proj\.)", Kind("an IP-Adapter")),
    (r"(^|\.)(double_blocks\.\d+\.img_attn|single_transformer_blocks\.\d)", Kind("a Flux model")),
    (r"(^|\.)joint_blocks\.\d|^transformer_blocks\.\d+\.attn\.add_q_proj", Kind("a Stable Diffusion 3 model")),
    (r"\.(time_stack|time_mixer)\.", Kind("a Stable Video Diffusion model")),
    (r"^conditioner\.embedders\.\d|^add_embedding\.linear_1\.", Kind("a Stable Diffusion XL model")),
    (
        r"^(RRDB_trunk\.|body\.\d+\.rdb1\.|model\.1\.sub\.\d+\.RDB1\.)|^layers\.\d+\.residual_group\.",
        Kind("an upscaler (a network such as ESRGAN or SwinIR)"),
    ),
)
# Parts of a model, if no other names are in the file.
UNET_ALONE = Kind("the U-Net of a diffusers folder alone", "give the folder of the whole model")
TEXT_ENCODER_ALONE = Kind("a text encoder alone", "give the whole model")
TEXT_WIDTHS = (768, 1024, 1280)  # channels of the text encoders of Stable Diffusion
XL_CONTEXT = 2048  # channels of the context of Stable Diffusion XL
LORA_BASES: tuple[tuple[str, str], ...] = (
    (r"double_blocks|single_transformer_blocks|single_blocks", "Flux"),
    (r"joint_blocks|^transformer\.transformer_blocks|^lora_transformer_transformer_blocks", "Stable Diffusion 3"),
    (r"^(lora_te2_|text_encoder_2\.)|input_blocks_[478]_1_transformer_blocks_[2-9]", "Stable Diffusion XL"),
)


def foreign_kind(shapes: Shapes, parts: bool = True) -> Kind | None:
    """Return the kind of weights that are not a model of this package; None for a model, and for unknown weights.

    Args:
        shapes: names and shapes of the weights.
        parts: also recognise parts of a model, such as its first stage alone.
    """
    for pattern, kind in MARKS:
        found = re.compile(pattern)
        if any(found.search(name) for name in shapes):
            base = lora_base(shapes) if kind.advice == LORA_ADVICE else None
            return kind if base is None else Kind(f"a LoRA for {base}", f"this package does not implement {base}")
    if _label_channels(shapes):
        return Kind("a Stable Diffusion XL model, or one of its relatives")
    return _part(shapes) if parts else None


def lora_base(shapes: Shapes) -> str | None:
    """Return the name of the model that a LoRA belongs to if this package does not implement it, else None."""
    for pattern, base in LORA_BASES:
        found = re.compile(pattern)
        if any(found.search(name) for name in shapes):
            return base
    contexts = (shape for name, shape in shapes.items() if re.search(r"attn2[._]to_k.*(down|lora_A)", name))
    return "Stable Diffusion XL" if any(XL_CONTEXT in shape for shape in contexts) else None


def _label_channels(shapes: Shapes) -> bool:
    """Return whether a U-Net embeds vectors such as sizes and pooled texts; no supported model of this package does."""
    return "model.diffusion_model.label_emb.0.0.weight" in shapes


def _is_embedding(shapes: Shapes) -> bool:
    """Return whether each name is a token, and its value vectors of a text encoder: the form of diffusers."""
    return bool(shapes) and all(
        "." not in name and len(shape) in (1, 2) and shape[-1] in TEXT_WIDTHS for name, shape in shapes.items()
    )


def _part(shapes: Shapes) -> Kind | None:
    if _is_embedding(shapes):
        return EMBEDDING
    if any(name.startswith(("model.", "first_stage_model.", "cond_stage_model.", "model_ema.")) for name in shapes):
        return None
    if _has(shapes, "down_blocks.", "up_blocks.", "time_embedding."):
        return UNET_ALONE
    if _has(shapes, "encoder.conv_in.", "decoder.conv_in."):
        return FIRST_STAGE
    if _has(shapes, "text_model.encoder.layers.") or _has(shapes, "transformer.resblocks.", "token_embedding."):
        return TEXT_ENCODER_ALONE
    return None


def _has(names: Iterable[str], *prefixes: str) -> bool:
    names = list(names)
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def check_not_foreign(shapes: Shapes, source: str, parts: bool = True) -> None:
    """Raise an error if weights are of a kind that is not a model.

    Args:
        shapes: names and shapes of the weights.
        source: name of the file in the message, in quotes.
        parts: also refuse parts of a model, such as its first stage alone.

    Raises:
        UserError: they are.
    """
    kind = foreign_kind(shapes, parts)
    if kind is not None:
        raise UserError(f"{printable(source, 1000)} is {kind.what}; {kind.advice}")
