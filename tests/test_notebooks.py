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
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({values}))"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises an error if a cell raises one
    *cells, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream"], "a cell prints text or warnings"
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    return json.loads(last.outputs[0].text), len(images)


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
def test_diffusion_in_two_dimensions(monkeypatch):
    values = """{
        "psnr": psnr,
        "loss": float(np.mean(losses[-500:])),
        "floor": floor,
        "distances": distances,
        "quality": quality,
        "solver_error": solver_error,
        "counts": counts,
        "spread": [spread[eta] for eta in (0.0, 0.2, 0.5, 1.0)],
        "purity": [purity[scale] for scale in (0.0, 1.0, 2.0, 4.0)],
        "coverage": [coverage[scale] for scale in (0.0, 1.0, 2.0, 4.0)],
    }"""
    found, images = execute("diffusion_2d", values, monkeypatch)
    assert images == 14
    raise SystemExit(found)


@pytest.mark.slow
def test_bundled_models(monkeypatch):
    values = """{
        "seed_difference": seed_difference,
        "differences": {f"{sampler} {steps}": value for (sampler, steps), value in differences.items()},
        "mean_psnr": {name: float(value) for name, value in mean_psnr.items()},
        "calls": calls[-1],
        "reconstruction": values,
        "decoded": list(decoded.shape),
    }"""
    found, images = execute("bundled_model", values, monkeypatch)
    assert images == 11
    raise SystemExit(found)
