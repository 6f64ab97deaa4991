"""Read LoRA files (arXiv:2106.09685): low-rank updates of the layers of a diffusion model and its text encoder.

Two forms are common: that of kohya's scripts, `lora_unet_NAME.lora_down.weight`, and that of diffusers and PEFT,
`unet.NAME.lora_A.weight`. NAME is that of the layer in diffusers; kohya replaces its dots by underscores.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io.checkpoint.kinds import LORA_NAME, foreign_kind, lora_base
from ldm.io.checkpoint.names import printable
from ldm.io.checkpoint.reading import Header, read_header, read_state_dict

UNET, TEXT_ENCODER = "unet", "text_encoder"
# Ends of names, and the factor or value that they hold. diffusers' older forms attach them to the layer by "_".
ENDS = (
    (r"[._]lora_?(?:linear_layer)?[._](?:down|A)(?:\.\w+)?(?:\.weight)?", "down"),
    (r"[._]lora_?(?:linear_layer)?[._](?:up|B)(?:\.\w+)?(?:\.weight)?", "up"),
    (r"\.lora_mid(?:\.weight)?", "mid"),
    (r"(?:[._]lora)?\.(?:alpha|network_alpha)", "alpha"),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?)", "dora"),
)
# Beginnings of names, and the part of the model that they mean.
STARTS = (
    (r"lora_unet_|unet\.|(?:base_model\.model\.)?(?:model\.)?diffusion_model\.|lora_unet\.", UNET),
    (r"lora_te1?_|text_encoder\.|lora_te\.|cond_stage_model\.", TEXT_ENCODER),
    (r"base_model\.model\.(?=text_model\.|encoder\.)", TEXT_ENCODER),
    (r"base_model\.model\.", UNET),
    (r"(?=text_model[._])", TEXT_ENCODER),
    (r"", UNET),
)
PEFT_METADATA = "lora_adapter_metadata"  # of diffusers' safetensors files: JSON with the options of PEFT


@dataclass(frozen=True)
class LowRank:
    """Low-rank update of the weight of one layer.

    Attributes:
        name: name of the layer in the file.
        down: (rank, in) or (rank, in, kh, kw).
        up: (out, rank), or the same with trailing dimensions of size 1.
        mid: (rank, rank, kh, kw) of a convolution between both; None without one.
        scale: factor of the product, alpha / rank.
    """

    name: str
    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float

    @property
    def inputs(self) -> int:
        """Number of input channels of the layer."""
        return self.down.shape[1]

    @property
    def outputs(self) -> int:
        """Number of output channels of the layer."""
        return self.up.shape[0]

    def delta_size(self) -> int:
        """Return the number of values of one row of the update."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return self.inputs * math.prod(kernel)

    def delta(self) -> Tensor:
        """Return the update (out, in · kh · kw) in float32."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if self.mid is None:
            return self.scale * (up @ down)
        return self.scale * torch.einsum("op,pqhw,qi->oihw", up, self.mid.float(), down).flatten(1)


def read_lora(path: str | os.PathLike[str]) -> dict[tuple[str, str], LowRank]:
    """Return the updates in a LoRA file by part, `UNET` or `TEXT_ENCODER`, and name of the layer with underscores.

    Raises:
        UserError: the file cannot be read, is not a LoRA, or holds updates of another form.
    """
    header = read_header(path)
    check_lora(header, path)
    parts: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    names = {}
    for name, value in read_state_dict(path).items():
        layer, kind = _split(name, path)
        key = _key(layer)
        parts[key][kind] = value
        names[key] = layer
    options = _peft_options(header.metadata)
    return {key: _low_rank(names[key], values, options.get(key[0], {}), path) for key, values in parts.items()}


def check_lora(header: Header, path: str | os.PathLike[str]) -> None:
    """Raise an error if a file is not a LoRA of a model that this package implements.

    Raises:
        UserError: it is not.
    """
    if not any(re.search(LORA_NAME, name) for name in header.shapes):
        kind = foreign_kind(header.shapes)
        what = f"{kind.what}, not a LoRA" if kind is not None else "not a LoRA: it has no weights lora_down or lora_A"
        raise UserError(f'"{path}" is {what}; give a LoRA file of kohya or diffusers')
    base = lora_base(header.shapes)
    if base is not None:
        raise UserError(f'"{path}" is a LoRA for {base}, which this package does not implement')


def _split(name: str, path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the layer and the kind of a weight of a LoRA.

    Raises:
        UserError: the weight has another form.
    """
    for end, kind in ENDS:
        match = re.fullmatch(rf"(.+?){end}", name)
        if match is not None and kind != "dora":
            return match[1], kind
        if match is not None:
            raise UserError(f'"{path}" is a DoRA, which scales the weights by directions; only LoRAs can be merged')
    raise UserError(f'"{path}" has a weight "{printable(name)}", which is not one of a LoRA; give another file')


def _key(layer: str) -> tuple[str, str]:
    for start, part in STARTS:
        match = re.match(start, layer)
        if match is not None:
            rest = layer[match.end() :].replace("processor.", "").replace(".", "_")
            # diffusers' first form has its own names for projections.
            rest = re.sub(r"(attn\d_to_out)$", r"\1_0", rest)
            return part, re.sub(r"self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", rest)
    raise AssertionError(layer)


def _peft_options(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the options of PEFT for each part; they state alpha if the file has no such entries."""
    try:
        content = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except ValueError:
        return {}
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in content.items() if isinstance(content, dict) else ():
        part, _, option = str(name).partition(".")
        found[part][option] = value
    return found


def _low_rank(
    name: str, values: Mapping[str, Tensor], options: Mapping[str, Any], path: str | os.PathLike[str]
) -> LowRank:
    if "down" not in values or "up" not in values:
        raise UserError(f'"{path}" is incomplete: "{printable(name)}" lacks one of its two factors; download it again')
    down, up = values["down"], values["up"]
    rank = down.shape[0]
    if up.dim() < 2 or down.dim() < 2 or up.shape[1] != rank:
        raise UserError(f'"{path}" is damaged: the factors of "{printable(name)}" have different ranks')
    alpha = values["alpha"].float().item() if "alpha" in values else options.get("lora_alpha", rank)
    return LowRank(name, down, up, values.get("mid"), float(alpha) / rank)
