"""Low-rank updates of the layers of a network (LoRA, arXiv:2106.09685), to train beside frozen weights.

A layer with the weight W computes with W + α/r · B A. A (r, inputs) is `down`, B (outputs, r) is `up`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # ends of the names of the projections of attention layers
KINDS = (nn.Linear, nn.Conv2d)
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")  # parameters of a convolution


def flat(name: str) -> str:
    """Return the name of a layer as that of a submodule, which contains no dots."""
    return name.replace(".", "_")


class LowRankUpdate(nn.Module):
    """Low-rank update of one linear layer or convolution; a new one is zero.

    Args:
        layer: the layer. A hook adds the update to its output.
        rank: r.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        self.down: nn.Linear | nn.Conv2d
        self.up: nn.Linear | nn.Conv2d
        if isinstance(layer, nn.Conv2d):
            geometry: dict[str, Any] = {name: getattr(layer, name) for name in GEOMETRY}
            self.down = nn.Conv2d(layer.in_channels, rank, bias=False, **geometry)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the update for the input of the layer, times `scale`."""
        return self.up(self.down(x)) * scale


class _AddUpdate:
    """Forward hook that adds an update to the output of its layer."""

    def __init__(self, lora: LoRA, update: LowRankUpdate) -> None:
        self.lora, self.update = lora, update

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(self.update.down.weight.dtype)
        return output + self.update(x, self.lora.scale).to(output.dtype)


class LoRA(nn.Module):
    """Low-rank updates of all layers of a network whose names have given ends.

    The network keeps its modules and the names of its weights. The caller freezes it.

    Args:
        network: the network.
        rank: r, the number of channels between both factors.
        alpha: α; the factor of the updates is α / r. By default α is r.
        targets: ends of the names of the layers, which must be linear layers or 2-d convolutions. The default are the
            projections of the attention layers.

    Raises:
        UserError: `rank` is not a positive integer, `alpha` is not positive, or a target matches no such layer.
    """

    alpha: Tensor

    def __init__(
        self, network: nn.Module, rank: int = 8, alpha: float | None = None, targets: Sequence[str] = ATTENTION
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or rank < 1:
            raise UserError(f"LoRA: rank must be an integer of at least 1, not {rank}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"LoRA: alpha must be above 0, not {alpha}; leave it out for that of the rank, {rank}")
        self.rank = rank
        # A checkpoint contains alpha, so that its updates can be merged without the configuration.
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))
        self.updates = nn.ModuleDict()
        for name, layer in _matching(network, targets):
            update = LowRankUpdate(layer, rank)
            layer.register_forward_hook(_AddUpdate(self, update))
            self.updates[flat(name)] = update

    @property
    def scale(self) -> Tensor:
        """Factor of the updates, α / r."""
        return self.alpha / self.rank


def _matching(network: nn.Module, targets: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the layers whose names have one of the ends.

    Raises:
        UserError: a target matches no layer, or a layer of another kind only.
    """
    layers = dict(network.named_modules())
    targets = [targets] if isinstance(targets, str) else list(targets)
    found: dict[str, nn.Module] = {}
    for target in targets:
        named = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{target}")}
        suitable = {name: layer for name, layer in named.items() if type(layer) in KINDS and _groups(layer) == 1}
        if not suitable:
            reason = f"{next(iter(named))} is a {type(next(iter(named.values()))).__name__}" if named else "has none"
            raise UserError(
                f'LoRA: the target "{target}" matches no linear layer or 2-d convolution of {type(network).__name__} '
                f"({reason}); name ends of layers, such as {', '.join(ATTENTION)}"
            )
        found |= suitable
    if not found:
        raise UserError(f"LoRA: targets is empty; name ends of layers, such as {', '.join(ATTENTION)}")
    return [(name, layer) for name, layer in layers.items() if name in found]


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def merged(weights: Mapping[str, Tensor], prefix: str, network: str) -> Mapping[str, Tensor]:
    """Return a state dict in which the updates are added to the weights of their layers.

    Args:
        weights: the state dict.
        prefix: prefix of the names of the updates, such as "model.lora."; without such names, nothing changes.
        network: prefix of the names of the layers, such as "model.diffusion_model.".
    """
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not own:
        return weights
    rest = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    layers = {flat(name.removeprefix(network).removesuffix(".weight")): name for name in rest}
    for layer, (down, up) in factors(own).items():
        weight = rest[layers[layer]]
        delta = up.float().flatten(1) @ down.float().flatten(1) * (own["alpha"].float() / down.shape[0])
        rest[layers[layer]] = (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)
    return rest


def factors(weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both factors, `down` and `up`, in the state dict of a `LoRA` by the flat names of the layers."""
    start, end = "updates.", ".down.weight"
    layers = [name.removeprefix(start).removesuffix(end) for name in weights if name.endswith(end)]
    return {layer: (weights[f"{start}{layer}{end}"], weights[f"{start}{layer}.up.weight"]) for layer in layers}
