"""Tests that the notebooks are stored without results, run, and show what their text says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = [*sorted(FOLDER.glob("*.ipynb")), ROOT / "scripts" / "latent_imagenet_diffusion.ipynb"]


def execute(name: str, values: str, monkeypatch) -> tuple[dict, int]:
    """Run a notebook of docs/notebooks in a kernel of its own.

    Args:
        name: the notebook.
        values: expression for a dict that JSON can hold, evaluated in the namespace of the notebook after its cells.

    Returns:
        The values, and the number of images that the notebook shows.
    """
    import nbformat
    from nbclient import NotebookClient

    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({values}))"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    *cells, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    outputs = [output for cell in cells for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    return json.loads(last.outputs[-1].text), len(images)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_format_4_5_without_results(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell["source"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.notebook
def test_diffusion_in_two_dimensions(monkeypatch):
    """Bounds leave a margin around the results of several seeds."""
    values = """{
        "psnr": psnr,
        "loss": float(np.mean(losses[-500:])),
        "floor": floor,
        "distances": list(distances.values()),
        "quality": {name: dict(zip(counts, values)) for name, values in quality.items()},
        "solver_error": {name: dict(zip(counts, values)) for name, values in solver_error.items()},
        "spread": [spread[eta] for eta in (0.0, 0.2, 0.5, 1.0)],
        "purity": [purity[scale] for scale in (0.0, 1.0, 2.0, 4.0)],
        "coverage": [coverage[scale] for scale in (1.0, 2.0, 4.0)],
    }"""
    found, images = execute("diffusion_2d", values, monkeypatch)
    assert images == 14
    assert found["psnr"] > 42
    assert found["loss"] < 0.28
    # Every sampler reaches the data: real data differ by up to 0.0022, samples of four DDIM steps by 0.013 or more.
    assert found["floor"] < 0.004
    assert max(found["distances"]) < 0.006
    quality = found["quality"]
    assert quality["DDIM"]["4"] > 0.008
    assert all(values["100"] < 0.006 and values["100"] < values["4"] / 2 for values in quality.values())
    assert quality["DPM-Solver++"]["10"] < quality["DDIM"]["10"] < quality["DDIM"]["5"]
    # DDIM is of first order, DPM-Solver++ of second.
    error = found["solver_error"]
    assert 0.35 < error["DDIM"]["20"] / error["DDIM"]["10"] < 0.65
    assert error["DPM-Solver++"]["20"] / error["DPM-Solver++"]["10"] < 0.4
    assert error["DPM-Solver++"]["20"] < 0.5 * min(error["DDIM"]["20"], error["PLMS"]["20"])
    # Without noise in the steps the start noise determines the sample.
    assert found["spread"][0] < 1e-5
    assert found["spread"] == sorted(found["spread"])
    assert found["spread"][-1] > 0.5
    # Guidance raises the purity and lowers the coverage.
    unconditional, conditional, guided, strongly_guided = found["purity"]
    assert 0.15 < unconditional < 0.35
    assert 0.93 < conditional < guided <= strongly_guided
    assert guided > 0.98
    assert strongly_guided > 0.99
    conditional, guided, strongly_guided = found["coverage"]
    assert conditional > 0.97
    assert 0.6 < guided < 0.95
    assert strongly_guided < 0.45


@pytest.mark.slow
@pytest.mark.notebook
def test_bundled_models(monkeypatch):
    values = """{
        "seed_difference": seed_difference,
        "last_call": calls[-1],
        "differences": {f"{sampler} {steps}": value for (sampler, steps), value in differences.items()},
        "kept": all(
            (np.asarray(result)[np.asarray(mask) == 0] == np.asarray(image)[np.asarray(mask) == 0]).all()
            for results in filled
            for result, image, mask in zip(results, inputs, masks, strict=True)
        ),
        "mean_psnr": {name: float(value) for name, value in mean_psnr.items()},
        "reconstruction": float(np.mean(reconstruction_psnr)),
        "path": [float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()) for a, b in zip(path, path[1:])],
    }"""
    found, images = execute("bundled_model", values, monkeypatch)
    assert images == 11
    assert found["seed_difference"] <= 1
    assert found["last_call"] == [30, 30]
    differences = found["differences"]
    assert differences["dpm 20"] < 1.5
    assert differences["dpm 20"] < min(differences["ddim 30"], differences["plms 30"]) / 2
    assert differences["plms 12"] < 15 < differences["plms 8"]
    assert found["kept"]
    assert found["mean_psnr"]["sampled"] > found["mean_psnr"]["bicubic"] + 1.5
    assert found["reconstruction"] > 23
    assert max(found["path"]) > 2 * min(found["path"])
