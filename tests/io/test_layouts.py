"""Tests of `ldm.io.layouts`."""

from __future__ import annotations

import re

import pytest

from ldm.errors import UserError
from ldm.io.layouts import read_labels, read_layouts, resolve

NAMES = ["Tortoise", "Dog", "Cat", "Wine glass"]
DOG = {"label": "Dog", "box": [0.25, 0.5, 1.0, 1.0]}


def test_class_names_are_read_from_lines_and_from_the_list_of_openimages(tmp_path):
    (tmp_path / "a.txt").write_text("Dog\n\nCat\n")
    (tmp_path / "b.csv").write_text('/m/011k07,Tortoise\n/m/1,"Knife, small"\n')
    assert read_labels(tmp_path / "a.txt") == ["Dog", "Cat"]
    assert read_labels(tmp_path / "b.csv") == ["Tortoise", "Knife, small"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_are_split_at_line_ends_only(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("a\u2028b\r\nc\x85d\re\x1cf\n".encode(encoding))
    assert read_labels(tmp_path / "a.txt") == ["a\u2028b", "c\x85d", "e\x1cf"]
    (tmp_path / "b.csv").write_bytes('/m/1,a\u2028b\r\n/m/2,"c\vd, e"\n'.encode(encoding))
    assert read_labels(tmp_path / "b.csv") == ["a\u2028b", "c\vd, e"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no file of labels"),
        ("a.txt", b"Dog\n\xff", "line 2 (byte 4) is not valid UTF-8; give UTF-8 text, one name a line"),
        ("a.txt", b"Dog\0", "line 1 contains a NUL character"),
        ("a.csv", b'"' + bytes(200_000).replace(b"\0", b"x"), "field larger than field limit"),
        ("a.txt", b"\n\n", "is empty"),
    ],
)
def test_invalid_files_of_labels_raise_user_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        read_labels(tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_layouts_are_read_in_every_encoding(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('[{"boxes": [{"label": "Bär"}]}]'.encode(encoding))
    assert read_layouts(tmp_path / "a.json") == [{"boxes": [{"label": "Bär"}]}]


def test_pixels_and_fractions_describe_the_same_layout():
    in_pixels = {"size": [200, 100], "boxes": [{"label": "Dog", "box": [50, 50, 200, 100]}]}
    assert resolve(in_pixels, NAMES) == resolve({"boxes": [DOG]}, NAMES)


BAD = {
    "right of the layout": ([0.5, 0, 1.2, 1], 'box 1 ("Dog") extends outside [0, 1]: [0.5, 0, 1.2, 1]'),
    "above the layout": ([0, -0.1, 1, 1], "extends outside"),
    "pixels without size": ([10, 10, 60, 60], 'for pixels give "size"'),
    "width instead of right": ([0.5, 0.5, 0.2, 0.2], "is empty"),
    "three numbers": ([0, 0, 1], "box 1 must be"),
    "words": (["a", 0, 1, 1], "box 1 must be"),
    "not finite": ([float("nan"), 0, 1, 1], "box 1 must be"),
    "huge": ([0, 0, 1, 10**400], "box 1 must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_error_names_the_invalid_box(case):
    box, message = BAD[case]
    with pytest.raises(UserError, match=re.escape(message)):
        resolve({"boxes": [{"label": "Dog", "box": box}]}, NAMES)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], "a layout must have a list of boxes"),
        ({"boxes": []}, "the layout has no box"),
        ({"boxes": [DOG], "sizes": [1, 1]}, 'unknown key "sizes" (did you mean "size"?)'),
        ({"boxes": [DOG], "size": [0, 10]}, '"size" must be'),
        ({"boxes": [DOG, {**DOG, "label": "Dgo"}]}, 'box 2 ("Dgo"): there is no such class (did you mean "Dog"?)'),
        ({"boxes": [{"label": None, "box": [0, 0, 1, 1]}]}, "a label must be the name or the number of a class"),
        ({"boxes": [{"box": [0, 0, 1, 1]}]}, "box 1 must be"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_layout_raises_user_error(layout, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(layout, NAMES)
