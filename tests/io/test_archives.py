"""Archives with weights, and malicious archives."""

from __future__ import annotations

import stat
import zipfile

import pytest

from ldm.errors import UserError
from ldm.io.archives import BadArchive, unpack_folders, unpack_weights


def write_zip(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "entries",
    [
        {"model.ckpt": b"w", "config.yaml": b"other"},
        {"celeba/model.ckpt": b"w", "__MACOSX/celeba/._model.ckpt": b"?", "celeba/old.ckpt": b"?"},
        {"epoch=12.ckpt": b"w", ".hidden.ckpt": b"?"},
    ],
)
def test_only_the_weights_are_written(tmp_path, entries):
    (tmp_path / "config.yaml").write_text("own")
    unpack_weights(write_zip(tmp_path / "a.zip", entries), tmp_path / "model.ckpt")
    assert (tmp_path / "model.ckpt").read_bytes() == b"w" and (tmp_path / "config.yaml").read_text() == "own"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("entries", [{}, {"readme.txt": b""}, {"a.ckpt": b"", "b.ckpt": b""}])
def test_an_archive_without_one_file_of_weights_raises_user_error(tmp_path, entries):
    with pytest.raises(UserError, match=r"does not contain one model\.ckpt, but"):
        unpack_weights(write_zip(tmp_path / "a.zip", entries), tmp_path / "model.ckpt")
    assert not (tmp_path / "model.ckpt").exists()


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


MALICIOUS = ["../evil.ckpt", "a/../../evil.ckpt", "/tmp/evil.ckpt", "C:evil.ckpt", "..\\evil.ckpt", link("model.ckpt")]


@pytest.mark.parametrize("name", MALICIOUS, ids=[str(getattr(name, "filename", name)) for name in MALICIOUS])
def test_entries_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    entries = {"good/model.ckpt": b"w", name: b"/etc/passwd"}
    archive = write_zip(tmp_path / "a.zip", entries)
    for unpack in (
        lambda: unpack_weights(archive, folder / "model.ckpt"),
        lambda: unpack_folders(archive, folder, ["good"]),
    ):
        with pytest.raises(BadArchive, match="refused: its entry"):
            unpack()
    assert not list(folder.iterdir()) and len(list(tmp_path.iterdir())) == 2


def test_zip_bombs_are_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"model.ckpt": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadArchive, match="would expand to 16,777,216 bytes"):
        unpack_weights(archive, tmp_path / "model.ckpt")


def test_a_zip_bomb_with_a_false_size_writes_no_file(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"model.ckpt": bytes(1 << 24)}, zipfile.ZIP_DEFLATED)
    size = (1 << 24).to_bytes(4, "little")
    archive.write_bytes(archive.read_bytes().replace(size, (1000).to_bytes(4, "little")))
    with pytest.raises(BadArchive, match="damaged"):
        unpack_weights(archive, tmp_path / "model.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def test_encrypted_archives_are_refused(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"model.ckpt": b"w"})
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(BadArchive, match="encrypted"):
        unpack_weights(archive, tmp_path / "model.ckpt")


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_archive_leaves_no_file(tmp_path, damage):
    archive = write_zip(tmp_path / "a.zip", {"model.ckpt": bytes(range(256)) * 100})
    content = archive.read_bytes()
    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    archive.write_bytes({"cut": content[:9000], "flipped": flipped, "text": b"hello", "empty": b""}[damage])
    with pytest.raises(BadArchive, match="is not a zip archive, or is damaged"):
        unpack_weights(archive, tmp_path / "model.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def files_in(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nested_folders_are_found(tmp_path):
    entries = {"all/one/a.npz": b"1", "two/deep/b.npz": b"2", "readme": b"", "three/c": b"3"}
    archive = write_zip(tmp_path / "a.zip", entries)
    unpack_folders(archive, tmp_path / "out", ["one", "two"])
    assert files_in(tmp_path / "out") == {"one/a.npz": b"1", "two/deep/b.npz": b"2"}


def test_a_single_folder_may_be_the_whole_archive(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"a.npz": b"1", "b.npz": b"2"})
    unpack_folders(archive, tmp_path / "out", ["one"])
    assert files_in(tmp_path / "out") == {"one/a.npz": b"1", "one/b.npz": b"2"}


def test_existing_folders_stay_and_missing_ones_raise_user_error(tmp_path):
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "mine").write_bytes(b"0")
    archive = write_zip(tmp_path / "a.zip", {"one/a": b"1", "two/b": b"2"})
    with pytest.raises(UserError, match="does not contain three") as raised:
        unpack_folders(archive, tmp_path / "out", ["one", "two", "three"])
    assert not isinstance(raised.value, BadArchive)
    assert files_in(tmp_path / "out") == {"one/mine": b"0", "two/b": b"2"}


def test_a_folder_is_unpacked_completely_or_not_at_all(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"one/a": b"first", "one/b": b"second"})
    archive.write_bytes(archive.read_bytes().replace(b"second", b"sEcond"))
    with pytest.raises(BadArchive):
        unpack_folders(archive, tmp_path / "out", ["one"])
    assert not list((tmp_path / "out").iterdir())
