"""Neighbours are those of the definition, whichever way they are found."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from retrieval_files import neighbours_by_argsort, vectors, write_database
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.retrieval import folders, searcher
from ldm.retrieval.database import Database, read_database
from ldm.retrieval.scann_index import ScannIndex
from ldm.retrieval.searcher import Searcher, exact_candidates, open_searcher

QUERIES = vectors(3, seed=9)


@pytest.fixture
def database(tmp_path):
    return read_database(write_database(tmp_path / "birds", vectors(200), vectors(100, seed=1)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("chunk_rows", [1, 64, 1000])
def test_neighbours_are_those_of_an_argsort(tmp_path, dtype, k, chunk_rows):
    rows = vectors(300, dtype=dtype)
    found = Searcher(Database(tmp_path, rows), chunk_rows=chunk_rows).search(torch.from_numpy(QUERIES), k)
    indices, scores = neighbours_by_argsort(rows, QUERIES, k)
    assert np.array_equal(found.indices.numpy(), indices)
    assert np.allclose(found.scores.numpy(), scores, atol=1e-6)
    expected = F.normalize(torch.from_numpy(rows[indices]).double(), dim=-1).float()
    assert torch.equal(found.embeddings, expected)


def test_inner_products_are_of_vectors_of_length_1(tmp_path):
    rows = np.array([[100.0, 100.0], [0.1, 0.0], [0.0, 1.0]], np.float32)
    found = Searcher(Database(tmp_path, rows)).search(torch.tensor([[5.0, 0.0]]), 3)
    assert found.indices.tolist() == [[1, 0, 2]]
    assert torch.allclose(found.scores, torch.tensor([[1.0, 0.5**0.5, 0.0]]))


@pytest.mark.parametrize("chunk_rows", [3, 16, 300])
def test_among_equals_the_first_in_the_database_comes_first(tmp_path, chunk_rows):
    rows = vectors(60)
    rows[[50, 11, 30, 4]] = rows[22]
    rows[41] = 2 * rows[22]  # the same direction, exactly
    found = Searcher(Database(tmp_path, rows), chunk_rows=chunk_rows).search(torch.from_numpy(rows[22:23]), 6)
    assert found.indices.tolist() == [[4, 11, 22, 30, 41, 50]]


@pytest.mark.parametrize("count", [1, 5, 40, 64])
@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 63])
def test_chunks_give_what_one_piece_gives(count, chunk_rows):
    """Numbers whose products are exact in float32, so that ties are ties in every order of summation."""
    rows = np.random.default_rng(0).choice([-1.0, 1.0], (64, 16)).astype(np.float32)
    queries = torch.from_numpy(rows[:4]) / 4
    whole = exact_candidates(rows, queries, count, 64)
    assert whole.shape == (4, count)
    assert torch.equal(exact_candidates(rows, queries, count, chunk_rows), whole)
    scores = queries.numpy() @ rows.T
    assert np.array_equal(whole.numpy(), np.argsort(-scores, axis=1, kind="stable")[:, :count])


def test_no_more_rows_than_a_chunk_are_worked_on(tmp_path, monkeypatch):
    seen = []
    plain = searcher.normalised
    monkeypatch.setattr(searcher, "normalised", lambda rows, *rest: seen.append(len(rows)) or plain(rows, *rest))
    Searcher(Database(tmp_path, vectors(100)), chunk_rows=30).search(torch.from_numpy(QUERIES), 2)
    assert seen == [30, 30, 30, 10]


def test_more_neighbours_than_vectors_are_all_of_them(tmp_path):
    rows = vectors(4)
    found = Searcher(Database(tmp_path, rows)).search(torch.from_numpy(QUERIES), 20)
    assert found.indices.shape == found.scores.shape == (3, 4) and found.embeddings.shape == (3, 4, 24)
    assert np.array_equal(found.indices.numpy(), neighbours_by_argsort(rows, QUERIES, 4)[0])


def test_queries_of_another_clip_are_told(database):
    with pytest.raises(UserError, match=r"birds.* vectors of 24 numbers, the queries have 32"):
        Searcher(database).search(torch.ones(1, 32), 3)


def test_a_damaged_vector_is_told(tmp_path):
    rows = vectors(50)
    rows[33, 0] = np.nan
    with pytest.raises(UserError, match="vector 33 holds numbers that are not finite"):
        Searcher(Database(tmp_path, rows), chunk_rows=20).search(torch.from_numpy(QUERIES), 3)


class Index:
    """Gives prepared answers in the place of ScaNN."""

    source = "birds-index"

    def __init__(self, count, answer):
        self.count, self.answer = count, answer

    def __len__(self):
        return self.count

    def candidates(self, queries, count):
        indices, scores = self.answer(queries, count)
        return indices, scores.astype(np.float32)


def test_what_an_index_finds_is_put_in_order(database):
    def backwards(queries, count):
        indices, scores = neighbours_by_argsort(database.embeddings, queries, count)
        return indices[:, ::-1].copy(), scores[:, ::-1] + 1e-3

    exact = Searcher(database).search(torch.from_numpy(QUERIES), 5)
    found = Searcher(database, index=Index(300, backwards)).search(torch.from_numpy(QUERIES), 5)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_where_an_index_finds_too_few_all_vectors_are_searched(database):
    def few(queries, count):
        return np.zeros((len(queries), count), np.int64), np.full((len(queries), count), np.nan)

    exact = Searcher(database).search(torch.from_numpy(QUERIES), 5)
    found = Searcher(database, index=Index(300, few)).search(torch.from_numpy(QUERIES), 5)
    assert torch.equal(found.indices, exact.indices)


def test_an_index_of_another_database_is_told(database):
    def of_another(queries, count):
        return neighbours_by_argsort(vectors(300, seed=5), queries, count)

    with pytest.raises(UserError, match=r"birds-index.*299 vectors, the database 300.*train it again"):
        Searcher(database, index=Index(299, of_another))
    with pytest.raises(UserError, match=r"birds-index.*scores are off by .*train it again"):
        Searcher(database, index=Index(300, of_another)).search(torch.from_numpy(QUERIES), 5)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with the database birds, outside of the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    write_database(folders.DATABASES / "birds", vectors(120))
    return tmp_path


def index_mark():
    mark = folders.SEARCHERS / "birds" / folders.INDEX_MARK
    mark.parent.mkdir(parents=True)
    mark.touch()


def test_without_an_index_the_search_is_exact(home, caplog):
    caplog.set_level(logging.INFO, "ldm")
    opened = open_searcher("birds")
    assert opened.index is None and len(opened.database) == 120
    assert [record.getMessage() for record in caplog.records] == [
        '120 vectors of "data/rdm/retrieval_databases/birds": exact search; there is no index of it'
    ]


def test_without_scann_the_search_is_exact(home, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "ldm")
    monkeypatch.setitem(sys.modules, "scann", None)
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    index_mark()
    assert open_searcher(str(home / folders.DATABASES / "birds")).index is None
    (record,) = caplog.records
    assert 'exact search, not by the index "data/rdm/searchers/birds"' in record.getMessage()
    assert 'pip install "ldm[retrieval]"' in record.getMessage()


def test_with_scann_a_damaged_index_is_told(home):
    pytest.importorskip("scann")
    index_mark()
    with pytest.raises(UserError, match=r"data/rdm/searchers/birds.* is damaged"):
        open_searcher("birds")


def test_an_index_that_is_there_is_used(home, caplog):
    pytest.importorskip("scann")
    caplog.set_level(logging.INFO, "ldm")
    exact = open_searcher("birds")
    rows = F.normalize(torch.from_numpy(vectors(120)), dim=1).numpy()
    ScannIndex.train(rows, 5).save(folders.SEARCHERS / "birds")
    opened = open_searcher("birds")
    assert "ScaNN's index" in caplog.records[-1].getMessage()
    found, expected = (one.search(torch.from_numpy(QUERIES), 8) for one in (opened, exact))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bird", r'no database "bird" \(did you mean "birds"\?\)'),
        ("artbench-barok", r'did you mean "artbench-baroque"\?'),
        (
            "artbench-baroque",
            r"run python scripts/download_weights.py artbench-databases",
        ),
        ("data/rdm/retrieval_databases/openimages", r"openimages-database"),
        ("", r'no database ""'),
    ],
)
def test_databases_that_are_not_there_are_told(home, name, said):
    with pytest.raises(UserError, match=said):
        open_searcher(name)
