"""Tests that the two READMEs say the same, that their Python code runs, and that their links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
BOTH = [pytest.param(ENGLISH, id="README.md"), pytest.param(CHINESE, id="README.zh.md")]
MAX_LINES = 150


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the code of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)


def prose(text: str) -> str:
    """Return the text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of each table, row by row; the line below the header counts as a row."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(text), flags=re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()] for rows in found]


def code_and_figures(cell: str) -> tuple[list[str], list[str], list[str]]:
    """Return what a translation of a cell keeps: code spans, link targets and figures, each in sorted order."""
    spans = re.findall(r"`[^`]+`", cell)
    targets = re.findall(r"\]\(([^)]+)\)", cell)
    rest = re.sub(r"`[^`]+`|\]\([^)]+\)", " ", cell)
    figures = re.findall(r"\d(?:[\d,.]*\d)?", rest)
    return sorted(spans), sorted(targets), sorted(figures)


def headings(text: str) -> list[int]:
    """Return the level of each heading."""
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(text), flags=re.M)]


def links(text: str) -> list[str]:
    """Return the targets of links and images that are not web addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if "://" not in target]


def test_readme_is_short():
    assert len(ENGLISH.splitlines()) <= MAX_LINES
    assert len(CHINESE.splitlines()) <= MAX_LINES


def test_readmes_start_with_the_image():
    for text in (ENGLISH, CHINESE):
        title, _, image = text.splitlines()[:3]
        assert title.startswith("# ")
        assert image.startswith("![") and image.endswith("(docs/images/emoji64.png)")


def test_both_readmes_have_the_same_code_blocks():
    assert code_blocks(ENGLISH) == code_blocks(CHINESE)
    assert {language for language, _ in code_blocks(ENGLISH)} == {"bash", "python", "bibtex"}


def test_both_readmes_have_the_same_structure():
    assert headings(ENGLISH) == headings(CHINESE)


def test_both_readmes_have_tables_of_the_same_shape():
    shapes = [[[len(row) for row in table] for table in tables(text)] for text in (ENGLISH, CHINESE)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) >= 3


def test_both_readmes_have_the_same_code_and_figures_in_tables():
    for ours, theirs in zip(tables(ENGLISH), tables(CHINESE), strict=True):
        for row, translated in zip(ours, theirs, strict=True):
            for cell, other in zip(row, translated, strict=True):
                assert code_and_figures(cell) == code_and_figures(other), f"{cell} | {other}"


def test_both_readmes_have_the_same_links():
    translations = {"README.md", "README.zh.md"}
    assert sorted(set(links(ENGLISH)) - translations) == sorted(set(links(CHINESE)) - translations)
    assert "README.zh.md" in links(ENGLISH)
    assert "README.md" in links(CHINESE)


@pytest.mark.parametrize("text", BOTH)
def test_linked_files_exist(text):
    missing = [target for target in links(text) if not (ROOT / target.partition("#")[0]).exists()]
    assert not missing


def test_python_lines_run(tmp_path, monkeypatch):
    blocks = [code for language, code in code_blocks(ENGLISH) if language == "python"]
    assert len(blocks) == 1
    assert len(blocks[0].splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})
    (saved,) = tmp_path.iterdir()
    with Image.open(saved) as image:
        assert image.size == (64, 64)
        assert image.mode == "RGB"
