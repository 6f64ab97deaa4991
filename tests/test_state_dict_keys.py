"""Names and shapes of the state dict of every published configuration, built on the meta device."""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from parity_cases import PARITY

from ldm.config.instantiate import instantiate_from_config


@cache
def recorded() -> dict[str, Any]:
    return json.loads(gzip.decompress((PARITY / "state_dicts.json.gz").read_bytes()))


def without_files(config: Any) -> Any:
    """Return the configuration without checkpoints to start from."""
    if isinstance(config, dict):
        return {key: without_files(value) for key, value in config.items() if key != "ckpt_path"}
    return config


def test_all_32_configurations_are_recorded():
    assert len(recorded()["models"]) == 32


@pytest.mark.parametrize("path", sorted(recorded()["models"]))
def test_names_and_shapes_are_as_recorded(path, repo_root):
    config = OmegaConf.to_container(OmegaConf.load(repo_root / path).model, resolve=True)
    with torch.device("meta"):
        model = instantiate_from_config(without_files(config))
    entries = {name: list(value.shape) for name, value in model.state_dict().items() if not name.startswith("loss.")}
    assert entries == recorded()["models"][path]


@pytest.mark.parametrize("path", sorted(recorded()["models"]))
def test_first_stage_weights_are_checkpoints(path, repo_root):
    text = (repo_root / path).read_text()
    lines = [line for line in text.splitlines() if "ckpt_path" in line]
    assert all(line.endswith("model.ckpt") for line in lines), lines
