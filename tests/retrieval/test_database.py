"""Read databases, and refuse invalid ones."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hostile_files import pickles
from retrieval_files import vectors, write_database

from ldm.errors import UserError
from ldm.retrieval.database import normalise, read_database

ROWS = vectors(5, 6)


def read_error(folder) -> str:
    with pytest.raises(UserError) as error:
        read_database(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def object_npy(pickled: bytes, shape: tuple[int, ...] = (5,)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + pickled


def zipped(path, **entries: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)


def test_files_are_concatenated_in_order_of_names(tmp_path):
    parts = [vectors(3, seed=1), vectors(4, seed=2), vectors(2, seed=3)]
    database = read_database(write_database(tmp_path, *parts))
    assert np.array_equal(database.embeddings, np.concatenate(parts))
    assert len(database) == 9


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("count", [1, 2])
def test_embeddings_keep_their_dtype(tmp_path, dtype, count):
    parts = [vectors(3, seed=seed, dtype=dtype) for seed in range(count)]
    read = read_database(write_database(tmp_path, *parts)).embeddings
    assert np.array_equal(read, np.concatenate(parts))
    assert read.dtype == np.dtype(dtype).newbyteorder("=") and read.dtype.isnative


def test_fortran_order_and_compression_are_supported(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", embedding=np.asfortranarray(ROWS))
    assert np.array_equal(read_database(tmp_path).embeddings, ROWS)


@pytest.mark.parametrize("name", ["img_id", "patch_coords"])
def test_other_arrays_are_optional(tmp_path, name):
    database = read_database(write_database(tmp_path, ROWS, **{name: None}))
    assert np.array_equal(database.embeddings, ROWS)


@pytest.mark.parametrize("kind", list(pickles("")))
def test_pickle_raises_user_error_and_is_not_run(tmp_path, kind):
    trap = tmp_path / "trap"
    zipped(tmp_path / "db" / "a.npz", embedding=object_npy(pickles(trap)[kind]))
    assert "must have the shape (N, D)" in read_error(tmp_path / "db")
    zipped(tmp_path / "db" / "a.npz", embedding=object_npy(pickles(trap)[kind], (5, 6)))
    assert 'the array "embedding" must have a floating-point dtype, not Python objects' in read_error(tmp_path / "db")
    zipped(tmp_path / "db" / "a.npz", embedding=npy(ROWS), img_id=object_npy(pickles(trap)[kind]))
    database = read_database(tmp_path / "db")
    assert np.array_equal(database.embeddings, ROWS)
    (tmp_path / "db" / "a.npz").write_bytes(pickles(trap)[kind])
    assert "cannot read" in read_error(tmp_path / "db")
    assert not trap.exists()


def test_img_id_of_objects_is_ignored(tmp_path):
    names = np.array([f"image{row}" for row in range(5)], dtype=object)
    folder = write_database(tmp_path, ROWS, img_id=names)
    assert np.array_equal(read_database(folder).embeddings, ROWS)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"embedding": ROWS[0]}, '"embedding" must have the shape (N, D), not (6,)'),
        ({"embedding": ROWS[None]}, '"embedding" must have the shape (N, D), not (1, 5, 6)'),
        ({"embedding": ROWS[:, :0]}, '"embedding" must have the shape (N, D), not (5, 0)'),
        ({"embedding": np.arange(30).reshape(5, 6)}, "must have a floating-point dtype, not int64"),
        ({"embedding": ROWS.astype(complex)}, "must have a floating-point dtype, not complex128"),
        ({"embedding": ROWS[:0], "img_id": None, "patch_coords": None}, "contains no vectors"),
        ({"embedding": None, "embeddings": ROWS}, 'has no array "embedding" (did you mean "embeddings"?)'),
        ({"embedding": ROWS[:4]}, 'has 4 vectors but 5 entries in "img_id"'),
        ({"patch_coords": np.zeros((4, 4))}, 'has 5 vectors but 4 entries in "patch_coords"'),
        ({"patch_coords": np.zeros((5, 3))}, '"patch_coords" must have the shape (N, 4), not (5, 3)'),
        ({"img_id": np.zeros((5, 1))}, '"img_id" must have the shape (N), not (5, 1)'),
    ],
)
def test_invalid_array_raises_user_error(tmp_path, replaced, message):
    assert message in read_error(write_database(tmp_path, ROWS, **replaced))


def test_array_names_are_escaped_in_messages(tmp_path):
    zipped(tmp_path / "a.npz", **{"a\nb\x1b[31m": npy(ROWS)})
    message = read_error(tmp_path)
    assert message.isprintable() and 'it contains "a\\nb' in message


def test_files_of_different_width_raise_user_error(tmp_path):
    message = read_error(write_database(tmp_path, ROWS, vectors(2, 7)))
    assert "part1.npz" in message and "vectors of width 7" in message


def test_folder_without_files_raises_user_error(tmp_path):
    assert "contains no NPZ files" in read_error(tmp_path)


def test_damaged_file_raises_user_error(tmp_path):
    whole = (write_database(tmp_path, ROWS) / "part0.npz").read_bytes()
    broken = bytearray(whole)
    broken[whole.index(ROWS.tobytes()) + 3] ^= 0xFF
    for content in (b"", b"text", whole[: len(whole) // 2], whole[40:], bytes(broken), npy(ROWS)):
        (tmp_path / "part0.npz").write_bytes(content)
        assert "cannot read the database file" in read_error(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 768)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-5, -6)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (5, 7)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 5}",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (5, 6)}",
        "{'descr': '<f4'}",
        "__import__('os').abort()",
        "[" * 5000,
        "'''",
        "",
    ],
)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x03\x00", b"\x09\x09"])
def test_forged_header_raises_user_error(tmp_path, header, version):
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    zipped(tmp_path / "a.npz", embedding=b"\x93NUMPY" + version + length + header.encode() + ROWS.tobytes())
    assert "cannot read the database file" in read_error(tmp_path)


def test_out_of_memory_raises_user_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    write_database(tmp_path, ROWS)
    monkeypatch.setattr(np.lib.format, "read_array", full)
    assert "needs 0.0 GB of memory" in read_error(tmp_path)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_row_that_is_not_finite_raises_user_error(number):
    rows = ROWS.copy()
    rows[3, 2] = number
    with pytest.raises(UserError, match=r"vector 103 is not finite"):
        normalise(rows, first=100)


def test_rows_of_any_length_are_normalised():
    rows = np.array([[0.0, 0.0], [3e4, 4e4], [3e-4, 4e-4]], np.float16)
    unit = normalise(rows).numpy()
    assert np.allclose(unit, [[0, 0], [0.6, 0.8], [0.6, 0.8]], atol=1e-3) and unit.dtype == np.float32


def test_hidden_files_are_no_part_of_a_database(tmp_path, caplog):
    caplog.set_level("INFO", "ldm")
    write_database(tmp_path, ROWS[:2], ROWS[2:])
    for name in ("._part0.npz", ".DS_Store", "README.md"):
        (tmp_path / name).write_bytes(b"x")
    assert np.array_equal(read_database(tmp_path).embeddings, ROWS)
    assert caplog.messages == [f'passed over 1 file in "{tmp_path}" besides the NPZ files: README.md']
