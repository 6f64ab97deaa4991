"""NumPy archives that are written row by row."""

from __future__ import annotations

import io

import numpy as np
import pytest

from ldm.io.npz import Rows, write_npz


@pytest.mark.parametrize("array", [np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.arange(5), np.ones((0, 2), "f4")])
def test_an_archive_equals_that_of_numpy(tmp_path, array):
    write_npz(tmp_path / "a" / "x.npz", {"arr_0": Rows(array.shape, array.dtype, iter(array)), "b": Rows.of(array[:1])})
    with np.load(tmp_path / "a" / "x.npz", allow_pickle=False) as read:
        assert read.files == ["arr_0", "b"]
        for name, expected in (("arr_0", array), ("b", array[:1])):
            assert read[name].dtype == array.dtype and np.array_equal(read[name], expected)
    whole = io.BytesIO()
    np.savez(whole, array, b=array[:1])
    assert len(whole.getvalue()) == (tmp_path / "a" / "x.npz").stat().st_size


def test_rows_are_consumed_one_at_a_time(tmp_path):
    """Only one row is in memory at a time."""
    alive = []

    def rows():
        for i in range(4):
            alive.append(i)
            yield np.full((3,), i, np.uint8)
            alive.remove(i)
            assert not alive

    write_npz(tmp_path / "x.npz", {"arr_0": Rows((4, 3), np.dtype("u1"), rows())})
    assert np.load(tmp_path / "x.npz")["arr_0"][:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([np.zeros(3, np.uint8)], "1 rows, not 2"),
        ([np.zeros(3, np.uint8), np.zeros(4, np.uint8)], "row 1"),
        ([np.zeros(3)], "row 0"),
    ],
)
def test_wrong_rows_leave_no_file(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "x.npz", {"arr_0": Rows((2, 3), np.dtype("u1"), rows)})
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_no_file(tmp_path):
    def rows():
        yield np.zeros(3, np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "x.npz", {"arr_0": Rows((2, 3), np.dtype("u1"), rows())})
    assert not list(tmp_path.iterdir())
