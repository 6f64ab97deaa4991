"""The packaging files agree with each other, and the commands in the documents exist and are tested."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ldm.config import assets, distribution

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13"]
SYSTEMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}

# Import names that differ from the name of their distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pytorch_lightning": "pytorch-lightning",
    "cv2": "opencv-python-headless",
}
# Needed although nothing imports them: Lightning logs to tensorboard; torchmetrics contains weights of LPIPS.
USED_BY_NAME = {"tensorboard", "torchmetrics"}
# Extras that add functions to the packages and the scripts; the others are for development.
FOR_USERS = ("clip", "data", "diffusers", "retrieval", "datasets", "evaluation")


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
    return {canonicalize_name(DISTRIBUTIONS.get(n, n)) for n in names - sys.stdlib_module_names - ours}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_dependency_is_pinned_once_and_within_its_range(python, system):
    applied = [pin for pin in pins() if applies(pin, python, system)]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in applied}
    assert len(versions) == len(applied), "a package is pinned twice"
    for requirement in ranges():
        if applies(requirement, python, system):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"constraints.txt has no pin of {requirement.name}"
            assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_pins_are_exact_and_name_no_index():
    for pin in pins():
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert pin.url is None
        assert "+" not in str(pin.specifier), f"{pin} is a local build"
    assert "://" not in read("constraints.txt") + read("environment.yaml") + read("Makefile") + read(".ci/run")


def test_imports_of_the_packages_are_declared_and_used():
    imported = third_party_imports(sources())
    extras = PROJECT["optional-dependencies"]
    for_users = [*PROJECT["dependencies"], *(text for name in FOR_USERS for text in extras[name])]
    declared = {canonicalize_name(Requirement(text).name) for text in for_users}
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert imported <= declared, "declare in pyproject.toml"
    assert core <= imported | USED_BY_NAME, "no longer needed"


def test_imports_of_tests_and_benchmarks_are_declared():
    extras = PROJECT["optional-dependencies"]
    declared = {
        canonicalize_name(Requirement(text).name)
        for text in [*PROJECT["dependencies"], *extras["test"], *extras["data"]]
    }
    installed_with_pytest = {"packaging"}
    installed_with_torch = {"setuptools"}
    imported = third_party_imports([*(ROOT / "tests").glob("**/*.py"), *(ROOT / "benchmarks").glob("*.py")])
    assert imported <= declared | installed_with_pytest | installed_with_torch


def test_the_conda_environment_installs_this_project():
    environment = yaml.safe_load(read("environment.yaml"))
    assert {environment["name"]} == set(PROJECT["scripts"])
    *conda, last = environment["dependencies"]
    python = next(entry.partition("=")[2] for entry in conda if entry.startswith("python="))
    assert python in PYTHONS
    assert last == {"pip": ["-c constraints.txt", "-e ."]}, "versions belong to pyproject.toml and constraints.txt"


def test_supported_python_versions_are_tested():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(supported.contains(python) for python in PYTHONS)
    assert not supported.contains("3.10")
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert set(matrix) <= set(PYTHONS)
    assert matrix[0] == PYTHONS[0], "the oldest version breaks first"
    classifiers = [text.rpartition(" :: ")[2] for text in PROJECT["classifiers"]]
    assert [name for name in classifiers if re.fullmatch(r"3\.\d+", name)] == PYTHONS


def test_type_checker_assumes_the_oldest_supported_python():
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["mypy"]
    assert settings["python_version"] == PYTHONS[0]
    assert "python -m mypy\n" in read("Makefile")


def text_files() -> Iterator[Path]:
    """Yield the repository's text files, without environments, caches and results."""
    skipped = {"build", "dist", "logs", "outputs", "debug_runs", "site", "__pycache__"}
    suffixes = {"", ".cfg", ".ipynb", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f in (".ci", ".github") or not (f.startswith(".") or f in skipped)]
        yield from (Path(folder, name) for name in names if Path(name).suffix in suffixes)


def test_no_file_installs_another_project_of_the_same_name():
    """On PyPI `ldm` and `latent-diffusion` belong to others."""
    other_project = re.compile(
        r"(?:pip3?|uv) (?:install|download|add)\b.*?[ \"'`\\](?:ldm|latent[-_.]diffusion)(?![\w./-])"
    )
    assert all(
        other_project.search(f"pip install {text}") for text in ("ldm", "-U ldm", '"ldm[clip]"', "latent-diffusion")
    )
    assert not any(
        other_project.search(f"pip install {text}") for text in ('"latent-diffusion-models[clip]"', "-e ./ldm")
    )
    offenders = []
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if path != Path(__file__) and other_project.search(text):
            offenders.append(str(path.relative_to(ROOT)))
    assert not offenders, f"the distribution is called {PROJECT['name']}"


def test_messages_about_missing_packages_name_extras_that_exist(monkeypatch):
    """Every `install_hint("extra")` in the sources names an extra, and is the only way that messages say `pip`."""
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"install_hint\([\"'](\w+)", text)) <= set(PROJECT["optional-dependencies"]), path
        if path.name != "distribution.py":
            assert "pip install" not in text, f"{path}: use ldm.config.distribution.install_hint"
    assert PROJECT["name"] == distribution.DISTRIBUTION
    assert distribution.install_hint("clip") == 'pip install -e ".[clip]"'
    assert distribution.install_hint() == "pip install -e ."
    monkeypatch.setattr(assets, "IS_CHECKOUT", False)
    assert distribution.install_hint("clip") == f'pip install "{PROJECT["name"]}[clip]"'


def test_the_version_is_that_of_the_project():
    assert distribution.version() == PROJECT["version"]


def test_the_changelog_describes_this_version():
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), flags=re.M)
    assert headings[0] == "Unreleased" and len(set(headings)) == len(headings)
    assert PROJECT["version"] in read("CHANGELOG.md")


def test_the_version_is_stated_once():
    stated = [path for path in [*sources(), ROOT / "setup.py"] if re.search(r"\bversion\s*=\s*[\"']", path.read_text())]
    stated += [path for path in sources() if "__version__ =" in path.read_text(encoding="utf-8")]
    assert not stated, "only pyproject.toml states the version"


def test_pre_commit_runs_the_pinned_ruff():
    pinned = next(str(pin) for pin in pins() if pin.name == "ruff")
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {entry for hook in hooks for entry in hook["additional_dependencies"]} == {pinned}


def test_only_the_packages_are_installed():
    from setuptools import find_packages

    include = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(find_packages(str(ROOT), include=include))
    folders = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in sources() if p.parts[-2] != "scripts"} - {"."}
    assert found == folders, "a folder of modules without __init__.py is not installed"


def test_ci_runs_the_make_verbs():
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    verbs = set(re.findall(r"^make ([a-z-]+)", script.read_text(), flags=re.M))
    assert {"test", "demo", "train-demo", "docs", "notebooks"} <= verbs


def test_documents_name_files_and_tests_that_exist():
    """Check `path` and `path::test_name` in documents; folders of the layer diagrams have no backticks.

    Files of users, such as the lists of a data set, do not exist here. Then the sources name them.
    """
    code = "".join(path.read_text(encoding="utf-8") for path in sources())
    wrong = []
    for document in DOCUMENTS:
        for path, _, test in (
            m.partition("::")
            for m in re.findall(r"`([\w./-]+\.(?:py|yaml|toml|txt|md)(?:::\w+)?)`", document.read_text())
        ):
            candidates = [
                ROOT / path,
                document.parent / path,
                *ROOT.glob(f"ldm/**/{path}"),
                *ROOT.glob(f"models/**/{path}"),
            ]
            found = next((candidate for candidate in candidates if candidate.is_file()), None)
            if found is None and not path.endswith(".py") and path in code:
                continue
            if found is None or (test and f"def {test}(" not in found.read_text(encoding="utf-8")):
                wrong.append(f"{document.relative_to(ROOT)}: {path} {test}")
    assert not wrong


# --- commands in the documents


def shown_commands(document: Path) -> list[list[str]]:
    """Return the words of each command in the ```bash blocks of a document."""
    commands = []
    for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s*(?:&&|\|\||;)\s*", line):
                words = shlex.split(part.removeprefix("$ "), comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                commands += [words] if words else []
    return commands


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
COMMANDS = [(document.name, words) for document in DOCUMENTS for words in shown_commands(document)]
MAKE = [pytest.param(words, id=f"{name}: {' '.join(words)}") for name, words in COMMANDS if words[0] == "make"]
PYTHON = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:80]}")
    for name, words in COMMANDS
    if re.search(r"(^|/)python3?$", words[0]) and len(words) > 1 and words[1].endswith(".py")
]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


LDM = [
    pytest.param(words, id=f"{name}: {' '.join(words)[:80]}")
    for name, words in COMMANDS
    if words[0] == "ldm" and not words[1].startswith("-")
]


@cache
def help_text(*program: str) -> str:
    done = subprocess.run(
        [sys.executable, *program, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


RUNNERS = {"run", "Popen", "check_call", "check_output", "run_path", "spec_from_file_location"}


def called(node: ast.Call) -> str:
    """Return the name of the function that a call calls, without its module."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def strings(nodes: Iterable[ast.AST]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def programs_run(test: ast.Module) -> set[str]:
    """Return the scripts that the tests in a file load or run, and `ldm NAME` for the sub-commands that they run.

    A name in a docstring, a comment or an expected message does not count.
    """
    nodes = list(ast.walk(test))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = {"main.py"} if "main" in modules or any(name.startswith("main.") for name in imported.values()) else set()
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if called(call) == "load_script" and (names := strings(call.args)):
            found.add(f"{names[1] if len(names) > 1 else 'scripts'}/{names[0]}.py")
        function = ast.unparse(call.func)
        target = re.fullmatch(r"ldm\.cli\.(\w+)\.main", imported.get(function.removesuffix(".main"), "") + ".main")
        target = target or re.fullmatch(r"ldm\.cli\.(\w+)\.main", imported.get(function, ""))
        if target and target[1] != "main":
            found.add(f"ldm {target[1]}")
        elif target:
            words = [argument.elts[:1] for argument in call.args if isinstance(argument, ast.List)]
            found |= {f"ldm {name}" for first in words for name in strings(first)}
    for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        inner = list(ast.walk(function))
        if any(isinstance(node, ast.Call) and called(node) in RUNNERS for node in inner):
            found |= {name for name in strings(inner) if re.fullmatch(r"scripts/\w+\.py", name)}
            paths = [node for node in inner if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
            parts = [strings([path.left.right, path.right]) for path in paths if isinstance(path.left, ast.BinOp)]
            found |= {"/".join(names) for names in parts if names[:1] == ["scripts"]}
    return found


@cache
def everything_run() -> set[str]:
    """Return what `programs_run` finds in every test."""
    tests = [path for path in (ROOT / "tests").glob("**/*.py") if path != Path(__file__)]
    return set().union(*(programs_run(ast.parse(path.read_text(encoding="utf-8"))) for path in tests))


def is_tried(script: str) -> bool:
    """Return whether a test runs a script, or the sub-command that it is another name of."""
    return bool({script, f"ldm {Path(script).stem}"} & everything_run())


def test_a_script_is_tried_only_if_a_test_runs_it():
    mentions = ast.parse('''
"""Tests of scripts/txt2img.py."""
def test_message(capsys):
    assert "scripts/inpaint.py" in capsys.readouterr().err  # load_script("replay")
''')
    assert programs_run(mentions) == set()
    runs = ast.parse("""
import main
from ldm.cli import img2img
from ldm.cli.main import main as ldm
from ldm.cli.txt2img import main as txt2img
from ldm.cli.inpaint import main as never_called
def test_one(load_script):
    load_script("txt2img").main(["--seed"])
    load_script("timing", "benchmarks")
def test_two(root):
    subprocess.run([sys.executable, "scripts/inpaint.py"])
def test_three(root):
    path = root / "scripts" / "replay.py"
    subprocess.run([sys.executable, path])
def test_four():
    assert ldm(["superres", "--seed", "1"]) == 0
    assert txt2img([]) == img2img.main([]) == 0
    other(["replay"])
""")
    scripts = {"scripts/txt2img.py", "scripts/inpaint.py", "scripts/replay.py", "benchmarks/timing.py"}
    assert programs_run(runs) == {"main.py", *scripts, "ldm superres", "ldm txt2img", "ldm img2img"}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make without the settings of an outer make that runs the tests."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@needs_make
@pytest.mark.parametrize("words", MAKE)
def test_shown_make_commands_exist_and_are_tried(words):
    planned = make("-n", *words[1:])
    assert planned.returncode == 0, planned.stderr
    if f"make {words[1] if len(words) > 1 else ''}" not in read(".ci/run"):
        for script in re.findall(r"scripts/\w+\.py", planned.stdout):
            assert is_tried(script), f"no test runs {script}"


def check_arguments(arguments: list[str], help_of_command: str) -> None:
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_of_command))
    options = [word.partition("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)]
    assert set(options) <= known
    for word in arguments:
        if re.fullmatch(r"(configs|models)/[\w./-]+\.yaml", word):
            assert (ROOT / word).is_file(), f"there is no {word}"


@pytest.mark.parametrize("words", PYTHON)
def test_shown_python_commands_exist_and_are_tried(words):
    script = words[1]
    assert (ROOT / script).is_file()
    assert is_tried(script), f"no test runs {script}"
    check_arguments(words[2:], help_text(script))


@pytest.mark.parametrize("words", LDM)
def test_shown_ldm_commands_exist_and_are_tried(words):
    name = words[1]
    script = "main.py" if name == "train" else f"scripts/{name}.py"
    assert {f"ldm {name}", script} & everything_run(), f"no test runs ldm {name}"
    check_arguments(words[2:], help_text("-c", "import sys; from ldm.cli.main import main; sys.exit(main())", name))


def test_every_sub_command_is_tried():
    from ldm.cli.main import COMMANDS as commands

    untried = [name for name in commands if name != "train" and not is_tried(f"scripts/{name}.py")]
    assert not untried and {"main.py", "ldm train"} & everything_run()


@needs_make
def test_the_help_lists_every_verb():
    listed = set(re.findall(r"^  make (\S+)", make("help").stdout, flags=re.M))
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), flags=re.M).group(1).split()
    assert listed == set(phony)
    for script in re.findall(r"(?:scripts/\w+|main)\.py", read("Makefile")):
        assert (ROOT / script).is_file(), f"the Makefile runs {script}, which does not exist"


@needs_make
def test_a_missing_python_is_an_error_of_one_line(tmp_path):
    done = make("demo", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "error: there is no no-such-python here" in done.stderr
    assert not (tmp_path / "venv").exists()
