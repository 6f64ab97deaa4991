"""Nearest-neighbour search, exact and with an index."""

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
from ldm.retrieval.searcher import Searcher, exact_candidates, highest, open_searcher

QUERIES = vectors(3, seed=9)


@pytest.fixture
def database(tmp_path):
    return read_database(write_database(tmp_path / "birds", vectors(200), vectors(100, seed=1)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("chunk_rows", [1, 64, 1000])
def test_neighbours_match_argsort(tmp_path, dtype, k, chunk_rows):
    rows = vectors(300, dtype=dtype)
    found = Searcher(Database(tmp_path, rows), chunk_rows=chunk_rows).search(torch.from_numpy(QUERIES), k)
    indices, scores = neighbours_by_argsort(rows, QUERIES, k)
    assert np.array_equal(found.indices.numpy(), indices)
    assert np.allclose(found.scores.numpy(), scores, atol=1e-6)
    expected = F.normalize(torch.from_numpy(rows[indices]).double(), dim=-1).float()
    assert torch.equal(found.embeddings, expected)


def test_scores_are_inner_products_of_unit_vectors(tmp_path):
    rows = np.array([[100.0, 100.0], [0.1, 0.0], [0.0, 1.0]], np.float32)
    found = Searcher(Database(tmp_path, rows)).search(torch.tensor([[5.0, 0.0]]), 3)
    assert found.indices.tolist() == [[1, 0, 2]]
    assert torch.allclose(found.scores, torch.tensor([[1.0, 0.5**0.5, 0.0]]))


@pytest.mark.parametrize("chunk_rows", [3, 16, 300])
def test_equal_scores_are_in_database_order(tmp_path, chunk_rows):
    rows = vectors(60)
    rows[[50, 11, 30, 4]] = rows[22]
    rows[41] = 2 * rows[22]  # the same direction, exactly
    found = Searcher(Database(tmp_path, rows), chunk_rows=chunk_rows).search(torch.from_numpy(rows[22:23]), 6)
    assert found.indices.tolist() == [[4, 11, 22, 30, 41, 50]]


@pytest.mark.parametrize("count", [1, 5, 40, 64])
@pytest.mark.parametrize("chunk_rows", [1, 7, 32, 63])
def test_chunk_size_does_not_change_neighbours(count, chunk_rows):
    """The values have exact products in float32, so that ties do not depend on the order of summation."""
    rows = np.random.default_rng(0).choice([-1.0, 1.0], (64, 16)).astype(np.float32)
    queries = torch.from_numpy(rows[:4]) / 4
    whole = exact_candidates(rows, queries, count, 64)
    assert whole.shape == (4, count)
    assert torch.equal(exact_candidates(rows, queries, count, chunk_rows), whole)
    scores = queries.numpy() @ rows.T
    assert np.array_equal(whole.numpy(), np.argsort(-scores, axis=1, kind="stable")[:, :count])


@pytest.mark.parametrize("levels", [1, 2, 7, 10_000])
@pytest.mark.parametrize("count", [1, 52, 999, 5000])
def test_highest_scores_are_the_first_among_equal_ones(levels, count):
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, levels, (3, 5000))).float()
    first = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(highest(scores, count), first.sort(dim=1).values)


def test_candidates_of_a_database_with_many_copies_are_in_database_order():
    """`topk` alone may return other copies."""
    rows = np.tile(vectors(20), (100, 1))
    queries = F.normalize(torch.from_numpy(vectors(3, seed=9)), dim=1)
    scores = queries @ F.normalize(torch.from_numpy(rows), dim=1).T
    expected = scores[:, :20].argsort(dim=1, descending=True)
    expected = (expected[:, :, None] + 20 * torch.arange(100)).flatten(1)[:, :130]
    for chunk_rows in (40, 700, 2000):
        assert torch.equal(exact_candidates(rows, queries, 130, chunk_rows), expected)


def test_rows_are_processed_in_chunks(tmp_path, monkeypatch):
    seen = []
    normalise = searcher.normalise
    monkeypatch.setattr(searcher, "normalise", lambda rows, *rest: seen.append(len(rows)) or normalise(rows, *rest))
    Searcher(Database(tmp_path, vectors(100)), chunk_rows=30).search(torch.from_numpy(QUERIES), 2)
    assert seen == [30, 30, 30, 10]


def test_more_neighbours_than_vectors_returns_all_vectors(tmp_path):
    rows = vectors(4)
    found = Searcher(Database(tmp_path, rows)).search(torch.from_numpy(QUERIES), 20)
    assert found.indices.shape == found.scores.shape == (3, 4) and found.embeddings.shape == (3, 4, 24)
    assert np.array_equal(found.indices.numpy(), neighbours_by_argsort(rows, QUERIES, 4)[0])


def test_queries_of_another_clip_raise_user_error(database):
    with pytest.raises(UserError, match=r"birds.* vectors of width 24, the queries have width 32"):
        Searcher(database).search(torch.ones(1, 32), 3)


def test_vector_that_is_not_finite_raises_user_error(tmp_path):
    rows = vectors(50)
    rows[33, 0] = np.nan
    with pytest.raises(UserError, match="vector 33 is not finite"):
        Searcher(Database(tmp_path, rows), chunk_rows=20).search(torch.from_numpy(QUERIES), 3)


class Index:
    """Index that returns the results of a function instead of ScaNN."""

    source = "birds-index"

    def __init__(self, count, search):
        self.count, self.search = count, search

    def __len__(self):
        return self.count

    def candidates(self, queries, count):
        indices, scores = self.search(queries, count)
        return indices, scores.astype(np.float32)


def test_candidates_of_index_are_sorted_exactly(database):
    def reversed_search(queries, count):
        indices, scores = neighbours_by_argsort(database.embeddings, queries, count)
        return indices[:, ::-1].copy(), scores[:, ::-1] + 1e-3

    exact = Searcher(database).search(torch.from_numpy(QUERIES), 5)
    found = Searcher(database, index=Index(300, reversed_search)).search(torch.from_numpy(QUERIES), 5)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_search_is_exact_if_index_finds_too_few(database):
    def empty_search(queries, count):
        return np.zeros((len(queries), count), np.int64), np.full((len(queries), count), np.nan)

    exact = Searcher(database).search(torch.from_numpy(QUERIES), 5)
    found = Searcher(database, index=Index(300, empty_search)).search(torch.from_numpy(QUERIES), 5)
    assert torch.equal(found.indices, exact.indices)


def test_index_of_another_database_raises_user_error(database):
    def other_search(queries, count):
        return neighbours_by_argsort(vectors(300, seed=5), queries, count)

    with pytest.raises(UserError, match=r"birds-index.*299 vectors, the database 300.*train it again"):
        Searcher(database, index=Index(299, other_search))
    with pytest.raises(UserError, match=r"birds-index.*scores are off by .*train it again"):
        Searcher(database, index=Index(300, other_search)).search(torch.from_numpy(QUERIES), 5)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Change to a working folder outside the repository, with the database birds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.config.assets.ROOT", tmp_path)
    write_database(folders.DATABASES / "birds", vectors(120))
    return tmp_path


def write_index_mark():
    mark = folders.SEARCHERS / "birds" / folders.INDEX_MARK
    mark.parent.mkdir(parents=True)
    mark.touch()


def test_search_without_index_is_exact(home, caplog):
    caplog.set_level(logging.INFO, "ldm")
    opened = open_searcher("birds")
    assert opened.index is None and len(opened.database) == 120
    assert [record.getMessage() for record in caplog.records] == [
        '120 vectors of "data/rdm/retrieval_databases/birds": exact search; there is no index'
    ]


def test_search_without_scann_is_exact(home, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "ldm")
    monkeypatch.setitem(sys.modules, "scann", None)
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    write_index_mark()
    assert open_searcher(str(home / folders.DATABASES / "birds")).index is None
    (record,) = caplog.records
    assert 'exact search without the index "data/rdm/searchers/birds"' in record.getMessage()
    assert 'pip install -e ".[retrieval]"' in record.getMessage()


def test_damaged_index_raises_user_error(home):
    pytest.importorskip("scann")
    write_index_mark()
    with pytest.raises(UserError, match=r"data/rdm/searchers/birds.* is damaged"):
        open_searcher("birds")


def test_existing_index_is_used(home, caplog):
    pytest.importorskip("scann")
    caplog.set_level(logging.INFO, "ldm")
    exact = open_searcher("birds")
    rows = F.normalize(torch.from_numpy(vectors(120)), dim=1).numpy()
    ScannIndex.train(rows, 5).save(folders.SEARCHERS / "birds")
    opened = open_searcher("birds")
    assert "ScaNN index" in caplog.records[-1].getMessage()
    found, expected = (each.search(torch.from_numpy(QUERIES), 8) for each in (opened, exact))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bird", r'no database "bird" \(did you mean "birds"\?\)'),
        ("artbench-barok", r'did you mean "artbench-baroque"\?'),
        (
            "artbench-baroque",
            r"run ldm download_weights artbench-databases",
        ),
        ("data/rdm/retrieval_databases/openimages", r"openimages-database"),
        ("", r'no database ""'),
    ],
)
def test_missing_database_raises_user_error(home, name, message):
    with pytest.raises(UserError, match=message):
        open_searcher(name)
