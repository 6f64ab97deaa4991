"""The files about installing agree with each other, and the README's commands are real and tried."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
SYSTEMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}

# Where the name that is imported differs from the name that is installed.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pytorch_lightning": "pytorch-lightning",
    "cv2": "opencv-python-headless",
}
# Needed although nothing imports them: Lightning writes its logs with one, the other brings a file of weights.
USED_BY_NAME = {"tensorboard", "lpips"}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def pins() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in read("constraints.txt").splitlines())
    return [Requirement(line) for line in lines if line]


def ranges() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for entries in lists for text in entries]


def applies(requirement: Requirement, python: str, system: str) -> bool:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_system": SYSTEMS[system],
        "platform_machine": "x86_64",
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)


def sources() -> list[Path]:
    return [*ROOT.glob("ldm/**/*.py"), *ROOT.glob("taming/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("main.py")]


def third_party_imports(paths: Iterable[Path]) -> set[str]:
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    ours = {"ldm", "taming", "main", "scripts", "benchmarks"} | {
        path.stem for path in [*sources(), *ROOT.glob("tests/*.py")]
    }
    return {canonicalize_name(DISTRIBUTIONS.get(n, n)) for n in names - sys.stdlib_module_names - ours - {"tomllib"}}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_lock_pins_every_dependency_once_and_within_its_range(python, system):
    applied = [pin for pin in pins() if applies(pin, python, system)]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in applied}
    assert len(versions) == len(applied), "a package is pinned twice"
    for requirement in ranges():
        if applies(requirement, python, system):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"constraints.txt does not pin {requirement.name}"
            assert requirement.specifier.contains(version), f"{requirement} excludes the locked {version}"


def test_the_lock_is_exact_and_names_no_index():
    for pin in pins():
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert pin.url is None
        assert "+" not in str(pin.specifier), f"{pin}: a local build"
    assert "://" not in read("constraints.txt") + read("environment.yaml") + read("Makefile") + read(".ci/run")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    imported = third_party_imports(sources())
    declared = {canonicalize_name(requirement.name) for requirement in ranges()}
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert imported <= declared, "declare in pyproject.toml"
    assert core <= imported | USED_BY_NAME, "no longer needed"


def test_what_tests_and_benchmarks_import_is_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(text).name)
        for text in [*PROJECT["dependencies"], *extras["test"], *extras["data"]]
    }
    brought_by_pytest = {"packaging", "tomli"}
    brought_by_torch = {"setuptools"}
    imported = third_party_imports([*(ROOT / "tests").glob("**/*.py"), *(ROOT / "benchmarks").glob("*.py")])
    assert imported <= declared | brought_by_pytest | brought_by_torch


def test_the_conda_environment_is_the_same_project():
    environment = yaml.safe_load(read("environment.yaml"))
    assert environment["name"] == PROJECT["name"]
    *conda, last = environment["dependencies"]
    python = next(entry.partition("=")[2] for entry in conda if entry.startswith("python="))
    assert python in PYTHONS
    assert last == {"pip": ["-c constraints.txt", "-e ."]}, "versions belong to pyproject.toml and constraints.txt"


def test_supported_pythons():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(supported.contains(python) for python in PYTHONS)
    assert not supported.contains("3.9")
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert set(matrix) <= set(PYTHONS)
    assert matrix[0] == PYTHONS[0], "the oldest version is the one that breaks"


def test_the_version_is_stated_once():
    stated = [path for path in [*sources(), ROOT / "setup.py"] if re.search(r"\bversion\s*=\s*[\"']", path.read_text())]
    stated += [path for path in sources() if "__version__ =" in path.read_text(encoding="utf-8")]
    assert not stated, "the version's home is pyproject.toml"


def test_pre_commit_runs_the_locked_ruff():
    locked = next(str(pin) for pin in pins() if pin.name == "ruff")
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {entry for hook in hooks for entry in hook["additional_dependencies"]} == {locked}


def test_only_the_packages_are_installed():
    from setuptools import find_packages

    include = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(find_packages(str(ROOT), include=include))
    folders = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in sources() if p.parts[-2] != "scripts"} - {"."}
    assert found == folders, "a folder of modules without __init__.py is not installed"


def test_ci_runs_the_readme_commands():
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert {"make test", "make demo", "make train-demo"} <= set(
        re.findall(r"^make [a-z-]+", script.read_text(), flags=re.M)
    )


def test_documents_name_files_and_tests_that_exist():
    """`path` and `path::test_name` in documents; folders of the layer diagrams are written without backticks."""
    for document in DOCUMENTS:
        for path, _, test in (
            m.partition("::")
            for m in re.findall(r"`([\w./-]+\.(?:py|yaml|toml|txt|md)(?:::\w+)?)`", document.read_text())
        ):
            candidates = [ROOT / path, document.parent / path, *ROOT.glob(f"ldm/**/{path}")]
            found = next((candidate for candidate in candidates if candidate.is_file()), None)
            assert found is not None, f"{document.name} names {path}"
            assert not test or f"def {test}(" in found.read_text(encoding="utf-8"), f"{document.name}: {path}::{test}"


# --- the commands that documents show


def shown_commands(document: Path) -> list[list[str]]:
    """The words of each command in a document's ```bash blocks."""
    commands = []
    for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s*(?:&&|\|\||;)\s*", line):
                words = shlex.split(part.removeprefix("$ "), comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                commands += [words] if words else []
    return commands


DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")) if path.exists()]
COMMANDS = [(document.name, words) for document in DOCUMENTS for words in shown_commands(document)]
MAKE = [pytest.param(words, id=f"{name}: {' '.join(words)}") for name, words in COMMANDS if words[0] == "make"]
PYTHON = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:80]}")
    for name, words in COMMANDS
    if re.search(r"(^|/)python3?$", words[0]) and len(words) > 1 and words[1].endswith(".py")
]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@cache
def help_text(script: str) -> str:
    done = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@cache
def everything_tried() -> str:
    """The text of the tests and of what continuous integration runs."""
    tests = [path for path in (ROOT / "tests").glob("**/*.py") if path != Path(__file__)]
    return "\n".join([path.read_text(encoding="utf-8") for path in tests] + [read(".ci/run")])


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a terminal, also when the tests themselves run under make."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_make
@pytest.mark.parametrize("words", MAKE)
def test_shown_make_commands_exist_and_are_tried(words):
    planned = make("-n", *words[1:])
    assert planned.returncode == 0, planned.stderr
    if f"make {words[1] if len(words) > 1 else ''}" not in read(".ci/run"):
        for script in re.findall(r"scripts/(\w+)\.py", planned.stdout):
            assert script in everything_tried(), f"nothing tries scripts/{script}.py"


@pytest.mark.parametrize("words", PYTHON)
def test_shown_python_commands_exist_and_are_tried(words):
    script = words[1]
    assert (ROOT / script).is_file()
    assert Path(script).stem in everything_tried(), f"nothing tries {script}"
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_text(script)))
    options = [word.partition("=")[0] for word in words[2:] if re.match(r"--?[A-Za-z]", word)]
    assert set(options) <= known
    for word in words[2:]:
        if re.fullmatch(r"(configs|models)/[\w./-]+\.yaml", word):
            assert (ROOT / word).is_file(), f"there is no {word}"


@needs_make
def test_the_help_lists_every_verb():
    listed = set(re.findall(r"^  make (\S+)", make("help").stdout, flags=re.M))
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), flags=re.M).group(1).split()
    assert listed == set(phony)
    for script in re.findall(r"(?:scripts/\w+|main)\.py", read("Makefile")):
        assert (ROOT / script).is_file(), f"the Makefile runs {script}, which does not exist"


@needs_make
def test_a_python_that_is_missing_is_one_plain_line(tmp_path):
    done = make("demo", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "error: there is no no-such-python here" in done.stderr
    assert not (tmp_path / "venv").exists()
