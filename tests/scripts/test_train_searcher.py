"""The command that trains an index."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from retrieval_files import neighbours_by_argsort, unit, vectors, write_database

from ldm.retrieval.database import Database
from ldm.retrieval.folders import DATABASES, INDEX_MARK, SEARCHERS
from ldm.retrieval.searcher import open_searcher


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("train_searcher")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def without_scann(monkeypatch):
    for name in ("scann", "scann.scann_ops.py"):  # the second, because another test may have imported it
        monkeypatch.setitem(sys.modules, name, None)


def error(script, capsys, *options: str) -> str:
    assert script.main(list(options)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_options_are_the_published_ones(script):
    args = script.make_parser().parse_args([])
    assert args.database == "data/rdm/retrieval_databases/openimages" and args.knn == 20
    short = script.make_parser().parse_args(["-d", "a", "-t", "b", "-k", "3"])
    long = script.make_parser().parse_args(["--database", "a", "--target_path", "b", "--knn", "3"])
    assert vars(short) == vars(long) == {"database": "a", "target_path": "b", "knn": 3}


def test_the_published_defaults_belong_together(script, home, capsys):
    pytest.importorskip("scann")
    write_database(DATABASES / "openimages", vectors(60))
    assert script.main([]) == 0
    assert capsys.readouterr().out.startswith("data/rdm/searchers/openimages: exact over 60 vectors, ")
    assert (SEARCHERS / "openimages" / INDEX_MARK).is_file()


def test_the_index_finds_what_is_near(script, home, capsys):
    pytest.importorskip("scann")
    rows, queries = vectors(80), vectors(2, seed=5)
    write_database(DATABASES / "birds", rows[:50], rows[50:])
    for _ in range(2):  # the second time in place of the first
        assert script.main(["-d", "birds", "-k", "4"]) == 0
    assert os.listdir(SEARCHERS) == ["birds"]
    opened = open_searcher("birds")
    assert opened.index is not None
    found = opened.search(torch.from_numpy(queries), 4).indices.numpy()
    assert np.array_equal(found, neighbours_by_argsort(rows, queries, 4)[0])


def test_vectors_are_of_length_1_in_float32(script, tmp_path):
    rows = vectors(7, dtype="float16")
    found = script.unit_vectors(Database(tmp_path, rows))
    assert found.dtype == np.float32
    assert np.allclose(found, unit(rows.astype(np.float64)), atol=1e-6)


def test_without_scann_one_line_names_the_extra(script, home, capsys, without_scann):
    write_database(DATABASES / "birds", vectors(5))
    message = error(script, capsys, "-d", "birds", "-t", "index")
    assert message == 'error: an index needs the package scann (for Linux); pip install "ldm[retrieval]"'
    assert not os.path.exists("index")


def test_mistakes_are_told_in_one_line(script, home, capsys):
    assert "openimages-database" in error(script, capsys)
    write_database(home / "birds", vectors(5))
    pytest.importorskip("scann")
    assert "exists and is no index" in error(script, capsys, "-d", "birds", "-t", ".")
    (home / "empty").mkdir()
    assert "holds no NPZ files" in error(script, capsys, "-d", "empty", "-t", "index")
    rows = vectors(5)
    rows[2] = np.nan
    write_database(home / "birds", rows)
    assert "vector 2 holds numbers that are not finite" in error(script, capsys, "-d", "birds", "-t", "index")
    assert sorted(os.listdir(home)) == ["birds", "empty"]


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
def test_the_number_of_neighbours_is_checked(script, value, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--knn", value])
    assert ended.value.code == 2 and "-k/--knn" in capsys.readouterr().err
