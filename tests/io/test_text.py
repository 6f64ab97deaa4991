"""Tests of `ldm.io.text`."""

from __future__ import annotations

import codecs

import pytest

from ldm.errors import UserError
from ldm.io.text import printable, read_lines, read_text

OTHER_SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # str.splitlines splits at these


def test_lines_end_at_line_feeds_and_carriage_returns_only(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(f"a{OTHER_SEPARATORS}b\r\nc\rd\n\n e ".encode())
    assert read_lines(path, "list") == [f"a{OTHER_SEPARATORS}b", "c", "d", "", " e "]
    assert read_text(path, "list") == f"a{OTHER_SEPARATORS}b\nc\nd\n\n e "


@pytest.mark.parametrize(("content", "lines"), [("", []), ("\n", [""]), ("a", ["a"]), ("a\n", ["a"])])
def test_a_line_end_at_the_end_of_a_file_starts_no_line(tmp_path, content, lines):
    (tmp_path / "x.txt").write_text(content)
    assert read_lines(tmp_path / "x.txt", "list") == lines


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_the_byte_order_mark_selects_the_encoding(tmp_path, mark, encoding):
    (tmp_path / "x.txt").write_bytes(mark + "grüße 🚀\r\nfox\r\n".encode(encoding))
    assert read_lines(tmp_path / "x.txt", "list") == ["grüße 🚀", "fox"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\nb\xff\n", "line 2 (byte 3) is not valid UTF-8"),
        (b"a\r\n\xff", "line 2 (byte 3) is not valid UTF-8"),
        (codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le") + b"\x00\xd8", "line 2 (byte 8) is not valid UTF-16"),
        (codecs.BOM_UTF16_LE + b"a\0b", "line 1 (byte 4) is not valid UTF-16"),
        (b"a\nb\n\0c", "line 3 contains a NUL character"),
        ("fox\n".encode("utf-16-le"), "line 1 contains a NUL character"),
    ],
)
def test_bytes_that_are_not_text_raise_user_error_with_the_line(tmp_path, content, reason):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_lines(path, "prompt file")
    assert str(raised.value) == f'cannot read the prompt file "{path}": {reason}; give UTF-8 text'


def test_missing_files_and_folders_raise_user_error(tmp_path):
    with pytest.raises(UserError, match=r'there is no list "none\.txt"; check the path'):
        read_text("none.txt", "list")
    with pytest.raises(UserError, match=r'cannot read the list ".*": Is a directory; give lines'):
        read_text(tmp_path, "list", "give lines")


def test_text_for_a_message_is_one_line_without_control_characters():
    assert printable("a\nb\r\x1b[31m\u2028\udcff") == "a\\nb\\r\\x1b[31m\\u2028\\udcff"
    assert printable("Größe 10:05\u202fPM 猫 👩‍🚀") == "Größe 10:05\u202fPM 猫 👩‍🚀"
