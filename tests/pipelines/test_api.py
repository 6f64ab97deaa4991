"""Tests of the package `ldm` as a library: its names, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ldm

ROOT = Path(__file__).parents[2]
ERRORS = {"PartialResultError", "UserError"}
NAMES = {
    *ERRORS,
    "class_to_image",
    "image_to_image",
    "inpaint",
    "layout_to_image",
    "lightning_module",
    "load",
    "reconstruct",
    "retrieval_to_image",
    "semantic_to_image",
    "super_resolve",
    "text_to_image",
    "unconditional",
}


def test_names_of_the_library():
    assert set(ldm.__all__) == NAMES and set(dir(ldm)) >= NAMES
    assert all(callable(getattr(ldm, name)) for name in NAMES)
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'text2image'"):
        ldm.text2image  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, ldm\n"
        "names = [name for name in dir(ldm) if not name.startswith('_')]\n"
        "heavy = {'torch', 'numpy', 'PIL', 'omegaconf', 'ldm.pipelines'} & set(sys.modules)\n"
        "print(sorted(heavy), set(ldm.__all__) <= set(names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[] True\n", done.stderr


@pytest.mark.parametrize("name", sorted(NAMES - ERRORS))
def test_every_function_documents_its_arguments(name):
    function = getattr(ldm, name)
    documented = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters.values():
        assert f"{parameter.name}" in documented, parameter
    assert "Args:" in documented and "Returns:" in documented


@pytest.mark.parametrize("path", sorted((ROOT / "ldm" / "pipelines").glob("*.py")), ids=lambda path: path.name)
def test_library_does_not_depend_on_the_commands(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name == "argparse" or name.startswith("ldm.cli")]
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert not calls & {"open", "print", "say", "save_png", "sys.exit"}
