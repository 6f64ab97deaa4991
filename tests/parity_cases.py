"""Recorded outputs of the published implementations, and how to replay them.

`cases.json` of each folder in `CASES` lists the cases; each has a configuration, a seed for
`deterministic_weights.fill`, a sentence that describes the computation, and its arrays in `NAME.npz`. Cases of Stable
Diffusion have a small text encoder, whose settings they state beside the configuration.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.config.instantiate import instantiate_from_config
from ldm.modules.encoders.text import TextEncoder

PARITY = Path(__file__).parent / "parity"
CASES = (PARITY / "cases", PARITY / "stable_diffusion" / "cases")


@dataclass(frozen=True)
class Case:
    """A recorded case."""

    name: str
    config: dict[str, Any] | None
    weights_seed: int
    what: str
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


@cache
def _cases() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the folder and the entry of each case, by name."""
    found = {}
    for folder in CASES:
        entries = json.loads((folder / "cases.json").read_text())
        found |= {name: (folder, entry) for name, entry in entries.items()}
    return found


def names() -> list[str]:
    """Return the names of the recorded cases."""
    return list(_cases())


@cache
def weights_module() -> Any:
    """Return the module that fills state dicts with values that depend on name, shape and seed only."""
    spec = importlib.util.spec_from_file_location("deterministic_weights", PARITY / "deterministic_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_case(name: str) -> Case:
    """Load the case `name` with its arrays as tensors."""
    folder, entry = _cases()[name]
    with np.load(folder / f"{name}.npz") as arrays:
        inputs = {key[3:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("in_")}
        outputs = {key[4:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("out_")}
    config = _with_text_encoder(entry["config"], entry.get("text_encoder"))
    return Case(name, config, entry["weights_seed"], entry["what"], inputs, outputs)


def _with_text_encoder(config: Any, settings: dict[str, Any] | None) -> Any:
    """Return the configuration of a case with the settings of its text encoder."""
    if settings is None:
        return config
    if "OpenCLIP" in settings:
        clip = settings["OpenCLIP"]
        text_config = {**clip["text_cfg"], "embed_dim": clip["embed_dim"]}
    else:
        text_config = settings["CLIPTextConfig"]
    config = copy.deepcopy(config)
    encoder = config.get("params", {}).get("cond_stage_config", config)
    encoder.setdefault("params", {})["text_config"] = text_config
    return config


def build(case: Case) -> torch.nn.Module:
    """Build the module of a case with its deterministic weights, in evaluation mode."""
    module = weights_module().fill(instantiate_from_config(case.config), case.weights_seed).eval()
    for part in module.modules():
        if isinstance(part, TextEncoder):
            part.has_weights = True
    return module


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖."""
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float = 1e-4) -> None:
    """Assert that the relative error stays under `tol`."""
    error = relative_error(actual, expected)
    assert error < tol, f"relative error {error:.2e}, allowed {tol:.0e}"
