"""The parts that a run trains beside a frozen model, as files in the form of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.io.checkpoint.loading import without_ema
from ldm.io.checkpoint.lora import UNET
from ldm.io.checkpoint.writing import save_safetensors
from ldm.io.diffusers import unet
from ldm.io.diffusers.translation import Translation
from ldm.models.diffusion.adaptation import LEARNED_WORDS, NETWORK, UPDATES
from ldm.modules.lora import factors, flat

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDING_FILE = "learned_embeds{}.safetensors"  # one file a token; those after the first have a number


@dataclass(frozen=True)
class Part:
    """File of trained weights.

    Attributes:
        file: its name.
        weights: its content.
        what: what it contains, for messages.
    """

    file: str
    weights: Mapping[str, Tensor]
    what: str

    def save(self, folder: Path, metadata: Mapping[str, Any], replace: bool = True) -> Path:
        """Write the file to a folder; return its path."""
        save_safetensors(self.weights, folder / self.file, metadata, replace)
        return folder / self.file


def trained_parts(weights: Mapping[str, Tensor], config: Mapping[str, Any], use_average: bool = True) -> list[Part]:
    """Return the low-rank updates and the vectors of new words in the weights of a model, one file each.

    Args:
        weights: state dict of the model, or a part with these weights and the names of those of the network.
        config: target and parameters of the model.
        use_average: take the averages of the updates if there are any.
    """
    params = config["params"]
    parts = []
    own = {name: value for name, value in weights.items() if UPDATES in name or name.startswith("model_ema.")}
    updates = {
        name.removeprefix(UPDATES): value
        for name, value in without_ema(own, use_average).items()
        if name.startswith(UPDATES)
    }
    if updates:
        layers = [name.removeprefix(NETWORK) for name in weights if name.startswith(NETWORK)]
        tensors = lora_in_diffusers_form(updates, layers, params["unet_config"]["params"])
        parts.append(Part(LORA_FILE, tensors, f"LoRA of {len(tensors) // 2} layers"))
    words = (params.get("personalization_config") or {}).get("params") or {}
    tokens = words.get("placeholder_strings", ())
    for index, token in enumerate([tokens] if isinstance(tokens, str) else tokens):
        vectors = weights.get(f"{LEARNED_WORDS}vectors.{index}")
        if vectors is not None:
            file = EMBEDDING_FILE.format(f"-{index}" if index else "")
            parts.append(Part(file, {token: vectors}, f'embedding of "{token}", {len(vectors)} vectors'))
    return parts


def lora_in_diffusers_form(
    updates: Mapping[str, Tensor], names: list[str], unet_params: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return low-rank updates under the names of diffusers; `up` contains the factor α / r.

    Layers that diffusers lacks keep their names here, which `merge_lora` reads too.

    Args:
        updates: state dict of a `LoRA`.
        names: names of the weights of the network.
        unet_params: parameters of the network.
    """
    translation = _translation(unet_params)
    weights = {flat(name.removesuffix(".weight")): name for name in names if name.endswith(".weight")}
    alpha = updates["alpha"].float()
    found: dict[str, Tensor] = {}
    for layer, (down, up) in factors(updates).items():
        start = f"{UNET}.{_their_name(translation, weights[layer]).removesuffix('.weight')}"
        found[f"{start}.lora_A.weight"] = down.float()
        found[f"{start}.lora_B.weight"] = up.float() * (alpha / down.shape[0])
    return found


def _translation(unet_params: Mapping[str, Any]) -> Translation:
    try:
        return Translation(unet.layers(unet_params))
    except (UserError, KeyError):  # diffusers has no such network
        return Translation(())


def _their_name(translation: Translation, name: str) -> str:
    try:
        names = translation.their_names(name)
    except KeyError:
        return name
    return names[0][0] if len(names) == 1 else name
