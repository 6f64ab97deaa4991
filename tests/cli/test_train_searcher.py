"""Tests of the command `train_searcher`."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from retrieval_files import neighbours_by_argsort, unit, vectors, write_database

from ldm.cli.train_searcher import main, make_parser, unit_vectors
from ldm.retrieval.database import Database
from ldm.retrieval.folders import DATABASES, INDEX_MARK, SEARCHERS
from ldm.retrieval.searcher import open_searcher


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def without_scann(monkeypatch):
    for name in ("scann", "scann.scann_ops.py"):  # another test may have imported the second
        monkeypatch.setitem(sys.modules, name, None)


def error(capsys, *options: str) -> str:
    """Return the error of the command, one line."""
    assert main(list(options)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_options_are_the_published_ones():
    args = make_parser().parse_args([])
    assert args.database == "data/rdm/retrieval_databases/openimages" and args.knn == 20
    short = make_parser().parse_args(["-d", "a", "-t", "b", "-k", "3"])
    long = make_parser().parse_args(["--database", "a", "--target_path", "b", "--knn", "3"])
    assert vars(short) == vars(long) == {"database": "a", "target_path": "b", "knn": 3}


def test_the_published_defaults_match(home, capsys):
    pytest.importorskip("scann")
    write_database(DATABASES / "openimages", vectors(60))
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("data/rdm/searchers/openimages: exact over 60 vectors, ")
    assert (SEARCHERS / "openimages" / INDEX_MARK).is_file()


def test_the_index_finds_the_nearest_vectors(home, capsys):
    pytest.importorskip("scann")
    rows, queries = vectors(80), vectors(2, seed=5)
    write_database(DATABASES / "birds", rows[:50], rows[50:])
    for _ in range(2):  # the second index replaces the first
        assert main(["-d", "birds", "-k", "4"]) == 0
    assert os.listdir(SEARCHERS) == ["birds"]
    opened = open_searcher("birds")
    assert opened.index is not None
    found = opened.search(torch.from_numpy(queries), 4).indices.numpy()
    assert np.array_equal(found, neighbours_by_argsort(rows, queries, 4)[0])


def test_unit_vectors_are_float32_of_length_1(tmp_path):
    rows = vectors(7, dtype="float16")
    found = unit_vectors(Database(tmp_path, rows))
    assert found.dtype == np.float32
    assert np.allclose(found, unit(rows.astype(np.float64)), atol=1e-6)


def test_without_scann_one_line_names_the_extra(home, capsys, without_scann):
    write_database(DATABASES / "birds", vectors(5))
    message = error(capsys, "-d", "birds", "-t", "index")
    assert (
        message == 'error: an index needs the package scann (for Linux); install it with pip install -e ".[retrieval]"'
    )
    assert not os.path.exists("index")


def test_wrong_inputs_are_one_line(home, capsys):
    assert "openimages-database" in error(capsys)
    write_database(home / "birds", vectors(5))
    pytest.importorskip("scann")
    assert "exists and is no index" in error(capsys, "-d", "birds", "-t", ".")
    (home / "empty").mkdir()
    assert "holds no NPZ files" in error(capsys, "-d", "empty", "-t", "index")
    rows = vectors(5)
    rows[2] = np.nan
    write_database(home / "birds", rows)
    assert "vector 2 holds numbers that are not finite" in error(capsys, "-d", "birds", "-t", "index")
    assert sorted(os.listdir(home)) == ["birds", "empty"]


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
def test_the_number_of_neighbours_is_checked(value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--knn", value])
    assert ended.value.code == 2 and "-k/--knn" in capsys.readouterr().err
