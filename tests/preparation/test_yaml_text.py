"""Tests of `ldm.preparation.yaml_text`."""

from __future__ import annotations

import yaml

from ldm.preparation.yaml_text import Note, plain, to_yaml

CONTENT = {
    "model": {
        "rate": Note(1e-05, "small"),
        "names": ["a: b", "yes", 3, "it's # no comment"],
        "inner": Note({"path": "/tmp/x y: #1", "none": None, "flag": True, "empty": {}, "text": "1e3"}, "a mapping"),
        "ünï": "\u2028",
    },
    "data": {"list": [[1, 2], {"a": 1}], "number": "0123"},
}


def test_the_text_is_valid_yaml_of_the_same_content():
    text = to_yaml(CONTENT, "first line\nsecond line: {")
    assert yaml.safe_load(text) == plain(CONTENT)
    assert text.startswith("# first line\n# second line: {\nmodel:\n")


def test_comments_are_at_the_end_of_their_lines():
    lines = to_yaml(CONTENT).splitlines()
    assert "  rate: 1.0e-05  # small" in lines and "  inner:  # a mapping" in lines and "data:" in lines
    assert lines[lines.index("data:") - 1] == ""
