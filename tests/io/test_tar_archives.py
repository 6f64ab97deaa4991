"""Tar archives that are unpacked: checked entries, and complete content."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from ldm.errors import DiskFullError, UserError
from ldm.io.archives import BadArchive
from ldm.io.tar_archives import check_space, extract, files_of, open_tar


def write_tar(path, files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def contents(path) -> dict[str, bytes]:
    with open_tar(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in files_of(archive, path)}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_archives_are_read_with_and_without_compression(tmp_path, mode):
    files = {"a.txt": b"a" * 1000, "folder/b.txt": b"b", "empty": b""}
    write_tar(tmp_path / "a.tar", files, mode)
    assert contents(tmp_path / "a.tar") == files


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_truncated_archives_raise_user_error(tmp_path, mode):
    random = np.random.default_rng(0)
    write_tar(tmp_path / "a.tar", {f"{n}.bin": random.bytes(5000) for n in range(3)}, mode)
    whole = (tmp_path / "a.tar").read_bytes()
    content = 3 * (512 + 5120) if mode == "w" else len(whole) * 9 // 10  # zeros follow
    for size in range(0, content, content // 40):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.tar") as raised:
            contents(tmp_path / "a.tar")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../a", "/a", "b/../../a", "b\\..\\a"])
def test_entries_that_leave_the_folder_are_refused(tmp_path, name):
    write_tar(tmp_path / "a.tar", {"first": b"1", name: b"2"})
    with pytest.raises(BadArchive, match="leaves the folder"):
        contents(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        entry = tarfile.TarInfo("a")
        entry.type, entry.linkname = kind, "b"
        archive.addfile(entry)
    with pytest.raises(BadArchive, match='its entry "a" is a link or a device'):
        contents(tmp_path / "a.tar")


def test_complete_files_are_not_written_again(tmp_path):
    write_tar(tmp_path / "a.tar", {"a": b"new content", "b": b"b"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_bytes(b"old content")
    (tmp_path / "out/b").write_bytes(b"")
    with open_tar(tmp_path / "a.tar") as archive:
        for entry in files_of(archive, tmp_path / "a.tar"):
            extract(archive, entry, tmp_path / "out" / entry.name)
    assert [(tmp_path / "out" / name).read_bytes() for name in "ab"] == [b"old content", b"b"]


def test_archives_that_cannot_be_opened_raise_user_error(tmp_path):
    with pytest.raises(UserError, match=r'cannot read the archive ".*none.tar": No such file'):
        contents(tmp_path / "none.tar")
    with pytest.raises(UserError, match="Is a directory"):
        contents(tmp_path)
    with pytest.raises(DiskFullError, match=r'unpacking "x.tar" needs 1,000,000.0 GB in ".*new", where .* GB are free'):
        check_space(tmp_path / "new", 10**15, 'unpacking "x.tar"')
