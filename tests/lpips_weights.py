"""Random weights of LPIPS, so that tests download nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.modules.losses.lpips import LPIPS, channel_weights


@cache
def _weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = {name: weight for name, weight in LPIPS().named_parameters() if name.startswith("net.")}
    scale = {name: (2.0 / weight[0].numel()) ** 0.5 if weight.dim() > 1 else 0.01 for name, weight in names.items()}
    return {**channel_weights(), **{name: scale[name] * torch.randn(names[name].shape) for name in names}}


def random_lpips() -> LPIPS:
    """Return a network with random features and the published weights of the channels."""
    network = LPIPS()
    network.load_state_dict({**network.state_dict(), **_weights()})
    network.prepare()
    return network


def write_lpips(path: Path, form: str = "lpips") -> Path:
    """Write random weights: "lpips", "vgg16" with torchvision's names, or a "checkpoint" of a first stage."""
    if form == "lpips":
        save_file(_weights(), path)
    elif form == "vgg16":
        names = {
            name: f"features.{name.removeprefix('net.').partition('.')[2]}" for name in _weights() if "net." in name
        }
        torch.save({theirs: _weights()[ours] for ours, theirs in names.items()}, path)
    else:
        torch.save({"state_dict": {f"loss.perceptual_loss.{name}": each for name, each in _weights().items()}}, path)
    return path
