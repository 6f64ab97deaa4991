"""Tables of images: CSV, TSV, JSON Lines and Parquet, with their damages."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from ldm.data.folder import FolderTrain
from ldm.data.tables import Table, is_text, read_table
from ldm.errors import UserError


@pytest.fixture(autouse=True)
def warnings_only(caplog):
    """Leave informative log lines out, also after a test that asked for them."""
    caplog.set_level("WARNING", "ldm")


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'path,text\na.png,"red, and ""big"""\nb.png,\n'),
        ("t.csv", '\ufeffpath;text\r\na.png;"red, and ""big"""\r\nb.png;\r\n'),
        ("t.TSV", 'path\ttext\na.png\t"red, and ""big"""\nb.png\t\n\n'),
        ("t.jsonl", '{"path": "a.png", "text": "red, and \\"big\\""}\n\n{"path": "b.png"}\n'),
    ],
)
def test_tables_of_text_are_read(name, content, tmp_path):
    table = read(tmp_path / name, content)
    assert table.columns == {"path": ["a.png", "b.png"], "text": ['red, and "big"', None]}
    assert len(table) == 2 and table.files() == ["a.png", "b.png"]


def test_table_in_utf_16_is_read(tmp_path):
    assert read(tmp_path / "t.csv", "path,text\na.png,é\n".encode("utf-16")).column("text") == ["é"]


def test_cells_may_contain_line_ends(tmp_path):
    assert read(tmp_path / "t.csv", 'path,text\na.png,"one\ntwo"\n').column("text") == ["one\ntwo"]


def test_parquet_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([b"red", b"caf\xe9", None], pyarrow.binary()).cast("string", safe=False)
    table = pyarrow.table({"file_name": ["a.png", "b.png", "c.png"], "text": texts, "label": [0, 1, None]})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet")
    assert found.files() == ["a.png", "b.png", "c.png"] and found.column("label") == [0, 1, None]
    assert found.column("text") == ["red", "caf\udce9", None]
    assert [is_text(text) for text in found.column("text")] == [True, False, False]


def test_missing_pyarrow_raises_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"Parquet tables need the package pyarrow; install it with .*datasets"):
        read_table(tmp_path / "t.parquet")


def test_damaged_parquet_raises_user_error(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match=r'cannot read the table ".*t\.parquet": .*; give a Parquet file') as raised:
        read(tmp_path / "t.parquet", b"PAR1")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "path,text\na.png,red, and big\nb.png\nc.png,x\n",
            '2 lines of the table "t.csv" do not have 2 cells, as the header has and are left out (line 2, 3); quote',
        ),
        (
            "t.jsonl",
            '{"path": "c.png"}\n["a.png"]\n{"path"\n' + "[" * 100_000 + "\n",
            '3 lines of the table "t.jsonl" are not JSON objects and are left out (line 2, 3, 4); write',
        ),
    ],
)
def test_damaged_rows_are_named_once_and_left_out(name, content, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    from pathlib import Path

    Path(name).write_text(content)
    assert read_table(Path(name)).files() == ["c.png"]
    (found,) = caplog.messages
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "has no rows; write one row for each image"),
        ("t.csv", "path,text\n", "has no rows; write one row for each image"),
        ("t.csv", b"path\0text\n", "is not text: it contains NUL characters; give UTF-8 text"),
        ("t.csv", "path,path\na,b\n", 'has two columns "path"; rename one'),
        ("t.jsonl", "[]\n", "has no rows; write one row for each image"),
    ],
)
def test_unusable_tables_raise_user_error(name, content, message, tmp_path):
    with pytest.raises(UserError) as raised:
        read(tmp_path / name, content)
    assert str(raised.value) == f'the table "{tmp_path / name}" {message}'


def test_missing_table_and_columns_raise_user_error(tmp_path):
    with pytest.raises(UserError, match='there is no table "'):
        read_table(tmp_path / "t.csv")
    table = Table(tmp_path / "t.csv", {"image": ["a.png"], "caption": ["x"]})
    with pytest.raises(UserError, match=r'has no column "captoin" \(did you mean "caption"\?\); its columns are image'):
        table.column("captoin")
    with pytest.raises(UserError, match='has no column "path"; its columns are image, caption'):
        table.files()


def test_bytes_that_are_not_utf_8_stay_in_their_cells(tmp_path):
    table = read(tmp_path / "t.csv", b"path,text\na.png,fine\nb.png," + b"caf\xe9\n")
    assert [is_text(text) for text in table.column("text")] == [True, False]
    assert json.dumps(table.column("text")[1]) == '"caf\\udce9"'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('path,text\na.png,"open\nb.png,x\n', 2),
        ('path,text\na.png,"two\nlines"\nb.png,"open', 4),
        ('path,"text\na.png,x\n', 1),
        ('path\n"a.png', 2),
    ],
)
def test_a_quote_that_is_not_closed_is_an_error_and_takes_no_rows_in_silence(text, line, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=f"the quote in line {line} is not closed; check its quotes$"):
        read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text('path,text\na.png,"two\nlines, one ""cell"""\n\n')
    assert read_table(tmp_path / "t.csv").columns == {"path": ["a.png"], "text": ['two\nlines, one "cell"']}


def test_rows_without_a_path_are_named_by_their_number(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,text\n,x\na.png,y\n")
    assert len(FolderTrain(str(tmp_path), files=str(tmp_path / "t.csv"), size=8)) == 1
    assert caplog.messages == ["FolderTrain: 1 of 2 images have no path in the table and are left out: row 1"]
