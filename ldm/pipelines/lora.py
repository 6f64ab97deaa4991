"""Merge LoRA files into the weights of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.io.checkpoint.lora import TEXT_ENCODER, UNET, LowRank, read_lora
from ldm.io.checkpoint.names import log_names
from ldm.io.diffusers import text_encoder, unet
from ldm.io.diffusers.translation import Translation

logger = logging.getLogger(__name__)
TEXT_MODEL = "text_model_"  # beginning of names that some programs leave out


@dataclass(frozen=True)
class Target:
    """Weight that an update changes, or some of its rows.

    Attributes:
        name: name of the weight in the model.
        weight: the weight.
        select: function that selects the rows; of a fused projection, those of the queries, for example.
    """

    name: str
    weight: nn.Parameter
    select: Callable[[Tensor], Tensor]

    def rows(self) -> Tensor:
        """Return the indices of the rows."""
        return self.select(torch.arange(self.weight.shape[0], device=self.weight.device))

    def check(self, update: LowRank, path: str | Path) -> None:
        """Raise an error if an update belongs to a layer of another size.

        Raises:
            UserError: it does.
        """
        outputs, inputs = len(self.rows()), self.weight.shape[1]
        if (update.outputs, update.inputs) != (outputs, inputs):
            raise UserError(
                f'the LoRA "{path}" belongs to another model: "{update.name}" maps {update.inputs} channels to '
                f"{update.outputs}, here {inputs} to {outputs}; give a LoRA that was trained for this model"
            )
        kernel = update.delta_size()
        if kernel != self.weight[0].numel():
            raise UserError(
                f'the LoRA "{path}" belongs to another model: "{update.name}" has {kernel} values a row, here '
                f"{self.weight[0].numel()}; give a LoRA that was trained for this model"
            )

    def add(self, update: LowRank, factor: float) -> None:
        """Add an update, computed in float32, to the rows."""
        rows = self.rows()
        delta = update.delta().to(self.weight.device) * factor
        with torch.no_grad():
            old = self.weight[rows]
            self.weight[rows] = (old.float() + delta.reshape(old.shape)).to(self.weight.dtype)


def merge_lora(model: Any, path: str | Path, factor: float = 1.0) -> None:
    """Add the low-rank updates in a LoRA file to the weights of a model.

    Args:
        model: a diffusion model with a U-Net of this package.
        path: file in the form of kohya's scripts, diffusers or PEFT.
        factor: factor of the updates; 0 changes nothing.

    Raises:
        UserError: the file cannot be read or belongs to another model; the model is unchanged.
    """
    updates = read_lora(path)
    targets = lora_targets(model)
    fitting = {key: targets[key] for key in updates if key in targets}
    if not fitting:
        first = next(iter(updates.values())).name
        raise UserError(f'the LoRA "{path}" belongs to another model: this one has no layer "{first}"')
    for key, target in fitting.items():
        target.check(updates[key], path)
    for key, target in fitting.items():
        target.add(updates[key], factor)
    log_names(
        "not used of", f'the LoRA "{path}"', [update.name for key, update in updates.items() if key not in targets]
    )
    logger.info('merged the LoRA "%s" with factor %g: %d layers', path, factor, len(fitting))


def lora_targets(model: Any) -> dict[tuple[str, str], Target]:
    """Return the weights that a LoRA can change by part and name, with underscores, in diffusers and here."""
    params = _params(model)
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    found: dict[tuple[str, str], Target] = {}
    if network is not None and "unet_config" in params:
        layers = Translation(unet.layers(params["unet_config"]["params"]))
        found |= {(UNET, name): target for name, target in _targets(network, layers)}
    stage = params.get("cond_stage_config")
    if isinstance(stage, Mapping) and stage.get("target") in text_encoder.EMBEDDERS:
        layers = Translation(text_encoder.layers(stage["target"], stage.get("params")))
        for name, target in _targets(model.cond_stage_model, layers):
            found[TEXT_ENCODER, name] = target
            found[TEXT_ENCODER, name.removeprefix(TEXT_MODEL)] = target
    return found


def _params(model: Any) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        raise UserError(f"this {type(model).__name__} does not know its configuration; load it with ldm.load")
    return config["params"]


def _targets(module: nn.Module, layers: Translation) -> Iterator[tuple[str, Target]]:
    for name, weight in module.named_parameters():
        if weight.dim() < 2:
            continue
        own = name.removesuffix(".weight").replace(".", "_")
        yield own, Target(name, weight, lambda value: value)
        try:
            theirs = layers.their_names(name)
        except KeyError:
            continue
        for other, select in theirs:
            yield other.removesuffix(".weight").replace(".", "_"), Target(name, weight, select)
