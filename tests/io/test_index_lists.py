"""Lists of indices in files."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.io.index_lists import read_indices


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "content",
    [[70000, 3], (70000, 3), np.array([70000, 3]), np.array([70000, 3], dtype=">i4"), [np.int64(70000), np.int64(3)]],
    ids=["list", "tuple", "array", "big endian", "scalars"],
)
def test_pickled_integers_are_read(tmp_path, content, protocol):
    (tmp_path / "a.p").write_bytes(pickle.dumps(content, protocol))
    indices = read_indices(tmp_path / "a.p")
    assert indices.tolist() == [70000, 3] and indices.dtype == np.int64


def test_text_and_arrays_are_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 0], dtype=np.uint16))
    assert read_indices(tmp_path / "a.npy").tolist() == [5, 0]
    for text in ("5\n0\n", "5, 0", "[5, 0]\r\n", "5 0"):
        (tmp_path / "a.txt").write_text(text)
        assert read_indices(tmp_path / "a.txt").tolist() == [5, 0]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_run_no_code(tmp_path):
    (tmp_path / "a.p").write_bytes(pickle.dumps([Hostile(tmp_path / "created")]))
    with pytest.raises(UserError, match=r"the pickle is refused, because it names (posix|nt)\.mkdir; give a .npy"):
        read_indices(tmp_path / "a.p")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, "a"], "contains a list that is not a list of integers"),
        ([[1]], "contains a list that is not a list of integers"),
        ({"a": 1}, "contains a dict"),
        ([True], "contains a list that is not"),
        (np.array([1.5]), "dtype 'f8', which are not integers"),
        (np.array([[1]]), r"its shape is \(1, 1\)"),
        ([3, -1], "contains the index -1; indices begin at 0"),
        ([2**70], "cannot read the list of indices"),
    ],
)
def test_other_pickles_raise_user_error(tmp_path, content, message):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message) as raised:
        read_indices(tmp_path / "a.pkl")
    assert "\n" not in str(raised.value)


def test_damaged_lists_raise_user_error(tmp_path):
    whole = pickle.dumps(list(range(100)))
    for name, data in [
        ("a.p", whole[:50]),
        ("b.p", b"\x80\x04garbage"),
        ("c.npy", b"\x93NUMPY"),
        ("d.txt", b"1\ntwo\n"),
        ("e.txt", b"1\n1.5\n"),
        ("f.txt", b"\xff\x00"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f'cannot read the list of indices ".*{name}"') as raised:
            read_indices(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="there is no list of indices"):
        read_indices(tmp_path / "none.txt")
