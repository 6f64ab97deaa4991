"""Recorded outputs of the published implementation, and how to replay them.

`tests/parity/cases/cases.json` lists the cases; each has a configuration, a seed for
`deterministic_weights.fill`, a sentence that describes the computation, and its arrays in `NAME.npz`.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.config.instantiate import instantiate_from_config

PARITY = Path(__file__).parent / "parity"


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
def _cases() -> dict[str, Any]:
    return json.loads((PARITY / "cases" / "cases.json").read_text())


@cache
def weights_module() -> Any:
    """Return the module that fills state dicts with values that depend on name, shape and seed only."""
    spec = importlib.util.spec_from_file_location("deterministic_weights", PARITY / "deterministic_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_case(name: str) -> Case:
    """Load the case `name` with its arrays as tensors."""
    entry = _cases()[name]
    with np.load(PARITY / "cases" / f"{name}.npz") as arrays:
        inputs = {key[3:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("in_")}
        outputs = {key[4:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("out_")}
    return Case(name, entry["config"], entry["weights_seed"], entry["what"], inputs, outputs)


def build(case: Case) -> torch.nn.Module:
    """Build the module of a case with its deterministic weights, in evaluation mode."""
    module = instantiate_from_config(case.config)
    return weights_module().fill(module, case.weights_seed).eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖actual - expected‖ / ‖expected‖."""
    actual, expected = actual.detach().double(), expected.double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, recorded {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tol: float = 1e-4) -> None:
    """Assert that the relative error stays under `tol`."""
    error = relative_error(actual, expected)
    assert error < tol, f"relative error {error:.2e}, allowed {tol:.0e}"
