"""Tests of the notebook that samples class-conditional images: its cells run unchanged."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_models import EMOJI_CLASSES, class_config, text_config, write_model

from ldm.cli.class2img import main


@pytest.fixture(scope="module")
def notebook(repo_root):
    return json.loads((repo_root / "scripts" / "latent_imagenet_diffusion.ipynb").read_text(encoding="utf-8"))


def run(notebook, monkeypatch) -> dict[str, object]:
    """Run all code cells and return their variables."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    variables: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), variables)  # our own file
    return variables


@pytest.mark.parametrize(
    ("name", "config", "labels"),
    [
        ("cin256-v2", class_config(1001, class_names="imagenet"), [25, 187, 448, 992]),
        ("emoji64", text_config(class_names=str(EMOJI_CLASSES)), [150, 1160]),
    ],
)
def test_images_equal_those_of_the_command(notebook, tmp_path, monkeypatch, name, config, labels):
    """Tiny models stand in for the published model, and for the bundled one that replaces it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    monkeypatch.setattr("ldm.config.assets.IS_CHECKOUT", False)
    monkeypatch.setenv("LDM_HOME", str(tmp_path))
    write_model(tmp_path / "models" / "ldm" / name, config)
    result = run(notebook, monkeypatch)
    assert result["name"] == name and result["labels"][: len(labels)] == labels
    assert result["options"] == {"sampler": "ddim", "steps": 20, "eta": 0.0, "scale": 3.0}
    assert result["samples_per_class"] == 6 and result["grid"].size == (6 * 18 + 2, 4 * 18 + 2)
    assert main(["--seed", "1"]) == 0
    with Image.open(tmp_path / "outputs" / "class2img-samples" / "grid-0000.png") as grid:
        assert (np.asarray(grid) == np.asarray(result["grid"])).all()
