"""Tests that the documents name real files, commands and functions, that their code runs, and that the site builds."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import ldm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("data/*/README.md"))]
TASKS = sorted(set(DOCS.glob("tasks/*.md")) - {DOCS / "tasks" / "index.md"})
# Code on these pages runs with the models of this repository.
RUNNABLE = [
    DOCS / "index.md",
    *(DOCS / "tasks" / f"{name}.md" for name in ("classes", "image-to-image", "inpainting", "reconstruction")),
    *(DOCS / "tasks" / f"{name}.md" for name in ("super-resolution", "text-to-image")),
]
# No image of these models can be made with the models of this repository.
WITHOUT_IMAGE = {"retrieval.md", "stable-diffusion.md"}
RUN_COMMAND = "import sys; from ldm.cli.main import main; sys.exit(main(sys.argv[1:]))"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Return the code of each fenced block in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def section(path: Path, heading: str) -> str:
    """Return the text below a heading of the second level."""
    match = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", path.read_text(encoding="utf-8"), re.S | re.M)
    assert match is not None, f"{path.name} has no section {heading}"
    return match[1]


def site() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def navigation(entry: object) -> Iterator[str]:
    """Yield the pages that the navigation lists."""
    if isinstance(entry, str):
        yield entry
    else:
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from navigation(each)


def test_navigation_lists_every_page_once():
    assert sorted(navigation(site()["nav"])) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_has_one_title(page):
    text = page.read_text(encoding="utf-8")
    included = re.fullmatch(r'--8<-- "(.+)"\n', text)
    text = (ROOT / included[1]).read_text(encoding="utf-8") if included else text
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, flags=re.M)) == 1


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_exist(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if target and not (document.parent / target).exists()]


@pytest.mark.parametrize("page", TASKS, ids=name_of)
def test_task_page_shows_command_call_and_image(page):
    assert re.search(r"^ldm \w", "".join(blocks(page, "bash")), flags=re.M)
    assert "ldm.load(" in "".join(blocks(page, "python"))
    images = re.findall(r"!\[[^\]]+\]\(\.\./images/(\w+\.png)\)", page.read_text(encoding="utf-8"))
    assert images or page.name in WITHOUT_IMAGE


def test_every_notebook_is_listed():
    text = (DOCS / "notebooks.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(notebooks/([\w-]+\.ipynb)\)", text))
    assert listed == {path.name for path in DOCS.glob("notebooks/*.ipynb")}


def test_every_image_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"images/([\w-]+\.png)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in (DOCS / "images").iterdir()}


# --- guides to the code


def test_ten_guesses_name_files():
    rows = re.findall(r"^\| (.+\?) \| `([\w/.]+)` \|$", section(DOCS / "architecture.md", "Ten guesses"), flags=re.M)
    assert len(rows) == 10
    assert not [path for _, path in rows if not (ROOT / path).is_file()]


def test_each_concern_has_one_home():
    rows = re.findall(
        r"^\| (.+) \| (.*`.+`.*) \|$", section(DOCS / "architecture.md", "One home for each concern"), re.M
    )
    assert len(rows) > 40
    concerns = [concern for concern, _ in rows]
    assert len(set(concerns)) == len(concerns)
    assert not [home for _, homes in rows for home in re.findall(r"`([\w/.]+)`", homes) if not (ROOT / home).exists()]


def test_training_loop_without_lightning(tmp_path, monkeypatch):
    (code,) = (block for block in blocks(DOCS / "architecture.md", "python") if "shared_step" in block)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(code, "architecture.md", "exec"), names)
    assert names["step"] == 9
    assert torch.isfinite(names["loss"])
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == names["model"].state_dict().keys()
    assert saved["scale_factor"] != 1, "measured on the first batch"
    assert saved["model_ema.num_updates"] == 10
    assert "lightning" not in code.lower()


# --- commands


def shown_ldm_commands() -> list[list[str]]:
    """Return the words of each `ldm` command in a bash block; several lines of one command are joined."""
    lines = (line for document in DOCUMENTS for block in blocks(document, "bash") for line in block.splitlines())
    commands = {line: shlex.split(line, comments=True) for line in lines if line.startswith("ldm ")}
    return list(commands.values())


@cache
def help_text(command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    arguments = [sys.executable, "-c", RUN_COMMAND, command, "--help"]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("words", shown_ldm_commands(), ids=" ".join)
def test_shown_ldm_command_exists(words):
    if words[1] == "--help":
        return
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", help_text(words[1])))
    assert {word.partition("=")[0] for word in words[2:] if re.match(r"--?[A-Za-z]", word)} <= known
    files = [word for word in words[2:] if re.match(r"(configs|data/\w+_examples)/", word)]
    assert not [file for file in files if not (ROOT / file).exists()]


OTHER_NAMES = {"PartialResultError", "UserError", "lightning_module", "load"}


def test_tables_of_commands_name_commands_and_functions():
    text = (DOCS / "tasks" / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `ldm ([\w-]+)` \| `ldm\.(\w+)` \|", text, flags=re.M)
    assert len(rows) == 10
    for command, function in rows:
        assert help_text(command)
        assert callable(getattr(ldm, function))
    assert sorted(function for _, function in rows) == sorted(
        set(ldm.__all__) - {"PartialResultError", "UserError", "lightning_module", "load"}
    )


# --- Python code

PYTHON = [
    pytest.param(code, id=f"{name_of(page)}-{i}") for page in PAGES for i, code in enumerate(blocks(page, "python"))
]


def keyword_options(function: object) -> set[str]:
    """Return the keyword arguments of a function of `ldm`, those of its `**options` included."""
    from ldm.pipelines.run import RunOptions, SamplerOptions

    signature = inspect.signature(function)
    names = {name for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD}
    packed = [str(each.annotation) for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD]
    for annotation in packed:
        names |= (SamplerOptions if "SamplerOptions" in annotation else RunOptions).__annotations__.keys()
        names |= RunOptions.__annotations__.keys()
    return names


@pytest.mark.parametrize("code", PYTHON)
def test_python_code_calls_functions_with_options_that_exist(code):
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "ldm":
            function = getattr(ldm, call.func.attr)
            assert {keyword.arg for keyword in call.keywords} <= keyword_options(function)


def test_table_of_keyword_options_is_complete():
    from ldm.pipelines.run import RunOptions, SamplerOptions

    text = section(DOCS / "tasks" / "index.md", "Keyword options in Python")
    shown = {name for row in re.findall(r"^\| (`.+?) \|", text, flags=re.M) for name in re.findall(r"`(\w+)`", row)}
    assert shown == {*RunOptions.__annotations__, *SamplerOptions.__annotations__, "steps", "scale"}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_python_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {"__name__": "page"})
    images = list(tmp_path.glob("*.png"))
    assert images
    for path in images:
        with Image.open(path) as image:
            assert image.size == (64, 64)
            assert image.mode == "RGB"


# --- the site


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocstrings", reason='needs the extra "docs"')
    pytest.importorskip("material", reason='needs the extra "docs"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    built = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").glob("**/index.html")}
    assert {"index.html", "api/ldm/index.html", "tasks/inpainting/index.html", "models/emoji64/index.html"} <= built
    interface = re.sub(r"<[^>]+>", "", (tmp_path / "site" / "api" / "ldm" / "index.html").read_text(encoding="utf-8"))
    assert not [name for name in ldm.__all__ if not name.endswith("Error") and f"{name}(" not in interface]
