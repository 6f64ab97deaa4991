"""ScaNN indices against exact search, in memory and on disk."""

from __future__ import annotations

import os
import pickle
import shutil

import numpy as np
import pytest
from hostile_files import Calls
from retrieval_files import neighbours_by_argsort, unit, vectors

from ldm.errors import UserError
from ldm.retrieval import scann_index
from ldm.retrieval.scann_index import ScannIndex, check_replaceable, search_method


@pytest.fixture
def scann():
    return pytest.importorskip("scann")


@pytest.fixture
def small_limits(monkeypatch):
    """Reduce the limits between search methods, and the number of leaves per searched leaf."""
    monkeypatch.setattr(scann_index, "EXACT_BELOW", 300)
    monkeypatch.setattr(scann_index, "HASHING_BELOW", 600)
    monkeypatch.setattr(scann_index, "LEAVES_PER_SEARCHED", 2)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, "exact"),
        (19_999, "exact"),
        (20_000, "hashing"),
        (99_999, "hashing"),
        (100_000, "partitions"),
        (7_000_000, "partitions"),
    ],
)
def test_search_method_depends_on_number_of_vectors(count, expected):
    assert search_method(count) == expected


def test_large_index_has_published_partitions(monkeypatch):
    """A large index has √N leaves and searches a twentieth of them."""
    arguments = {}

    class Builder:
        def tree(self, leaves, searched, **rest):
            arguments.update(leaves=leaves, searched=searched)
            return self

        def score_ah(self, *args, **rest):
            return self

        reorder = score_ah

        def build(self):
            return None

    class FakeScann:
        def builder(self, embeddings, k, measure):
            arguments.update(measure=measure, k=k)
            return Builder()

    monkeypatch.setattr(scann_index, "import_scann", FakeScann)
    ScannIndex.train(np.broadcast_to(np.float32(1.0), (1_000_000, 4)), 20)
    assert arguments == {"leaves": 1000, "searched": 50, "measure": "dot_product", "k": 20}


@pytest.mark.parametrize("count", [1, 200])
def test_small_index_returns_exact_neighbours(scann, tmp_path, count):
    rows, queries = unit(vectors(count)), unit(vectors(4, seed=7))
    index = ScannIndex.train(rows, 20)
    index.save(tmp_path / "index")
    for trained in (index, ScannIndex.load(tmp_path / "index")):
        found, scores = trained.candidates(queries, min(count, 30))
        expected, expected_scores = neighbours_by_argsort(rows, queries, 30)
        assert len(trained) == count and found.dtype == np.int64
        assert np.array_equal(found, expected) and np.allclose(scores, expected_scores, atol=1e-6)


@pytest.mark.parametrize("count", [500, 1000])
def test_larger_index_finds_most_neighbours(scann, small_limits, tmp_path, count):
    rows = unit(unit(vectors(10, seed=3))[np.arange(count) % 10] + 0.5 * unit(vectors(count, seed=4)))
    queries = rows[:16]
    index = ScannIndex.train(rows, 20)
    index.save(tmp_path / "index")
    found, scores = ScannIndex.load(tmp_path / "index").candidates(queries, 10)
    expected, _ = neighbours_by_argsort(rows, queries, 10)
    shared = [len({*a} & {*b}) / 10 for a, b in zip(found, expected, strict=True)]
    assert np.mean(shared) > 0.9
    assert np.allclose(scores, np.einsum("qd,qkd->qk", queries, rows[found]), atol=1e-5)
    assert (tmp_path / "index" / "serialized_partitioner.pb").exists() == (count == 1000)


def test_index_can_be_moved(scann, tmp_path):
    rows = unit(vectors(50))
    ScannIndex.train(rows, 5).save(tmp_path / "a" / "index")
    shutil.move(tmp_path / "a" / "index", tmp_path / "b")
    assert ScannIndex.load(tmp_path / "b").candidates(rows[:1], 1)[0].tolist() == [[0]]


@pytest.mark.parametrize("assets_list", ["with paths of another machine", "missing"])
def test_index_of_older_version_is_read(scann, tmp_path, assets_list):
    rows = unit(vectors(50))
    ScannIndex.train(rows, 5).save(tmp_path)
    assets = tmp_path / "scann_assets.pbtxt"
    if assets_list == "missing":
        assets.unlink()
    else:
        assert '"dataset.npy"' in assets.read_text()
        assets.write_text(assets.read_text().replace('"dataset.npy"', '"/somewhere/else/dataset.npy"'))
    before = sorted(os.listdir(tmp_path))
    assert ScannIndex.load(tmp_path).candidates(rows[7:8], 1)[0].tolist() == [[7]]
    assert sorted(os.listdir(tmp_path)) == before


def test_pickle_in_index_is_not_read(scann, tmp_path):
    ScannIndex.train(unit(vectors(50)), 5).save(tmp_path / "index")
    pickled = pickle.dumps(Calls(os.mkdir, str(tmp_path / "trap")))
    (tmp_path / "index" / "scann_docids.pkl").write_bytes(pickled)
    assert len(ScannIndex.load(tmp_path / "index")) == 50
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "garbage"])
def test_damaged_index_raises_user_error(scann, small_limits, tmp_path, damage):
    whole = tmp_path / "whole"
    ScannIndex.train(unit(vectors(700)), 5).save(whole)
    for file in sorted(whole.iterdir()):
        content = file.read_bytes()
        damaged = tmp_path / "damaged"
        shutil.copytree(whole, damaged)
        if damage == "missing":
            (damaged / file.name).unlink()
        else:
            changed = {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\xb9\x01" * 100}[damage]
            (damaged / file.name).write_bytes(changed)
        if (file.name, damage) != ("scann_assets.pbtxt", "missing"):  # a missing list is replaced
            with pytest.raises(UserError, match=r"damaged.* is damaged \(.*train it again") as error:
                ScannIndex.load(damaged)
            assert "\n" not in str(error.value)
        shutil.rmtree(damaged)


def test_queries_of_other_width_raise_user_error(scann):
    index = ScannIndex.train(unit(vectors(50, 24)), 5)
    with pytest.raises(UserError, match=r'"the index" cannot be searched \(.*\); remove it'):
        index.candidates(unit(vectors(1, 32)), 5)


def test_failed_write_keeps_old_index(tmp_path):
    class Searcher:
        def serialize(self, folder, relative_path):
            open(os.path.join(folder, "half"), "w").close()
            raise RuntimeError("I/O\nerror")

    old = tmp_path / "index"
    old.mkdir()
    (old / scann_index.INDEX_MARK).write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*index.*: I/O error; choose another"):
        ScannIndex(Searcher(), "x").save(old)
    assert os.listdir(tmp_path) == ["index"] and os.listdir(old) == [scann_index.INDEX_MARK]


def test_only_an_index_is_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("empty", "new"):
        check_replaceable(tmp_path / name)
    for existing in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists and is not an index"):
            check_replaceable(existing)
