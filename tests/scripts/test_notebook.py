"""The notebook of class-conditional pictures: its cells run as they stand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_models import class_config, text_config, write_model


@pytest.fixture(scope="module")
def notebook(repo_root):
    return json.loads((repo_root / "scripts" / "latent_imagenet_diffusion.ipynb").read_text(encoding="utf-8"))


def run(notebook, monkeypatch) -> dict[str, object]:
    """The variables after all code cells."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    variables: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), variables)  # our own file
    return variables


def test_it_is_a_notebook_of_format_4_without_results(notebook):
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and cell["source"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize(
    ("name", "config", "labels"),
    [("cin256-v2", class_config(1001), [25, 187, 448, 992]), ("emoji64", text_config(), [150, 1160])],
)
def test_its_cells_draw_what_the_command_draws(notebook, load_script, tmp_path, monkeypatch, name, config, labels):
    """With the published model where its weights are, else with the bundled one; tiny ones in their place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    write_model(tmp_path / "models" / "ldm" / name, config)
    result = run(notebook, monkeypatch)
    assert result["files"].name == name and result["labels"][: len(labels)] == labels
    settings = result["settings"]
    assert (settings.sampler, settings.steps, settings.eta, settings.scale) == ("ddim", 20, 0.0, 3.0)
    assert result["samples_per_class"] == 6 and result["grid"].size == (6 * 18 + 2, 4 * 18 + 2)
    assert load_script("class2img").main(["--seed", "1"]) == 0
    with Image.open(tmp_path / "outputs" / "class2img-samples" / "grid-0000.png") as sheet:
        assert (np.asarray(sheet) == np.asarray(result["grid"])).all()
