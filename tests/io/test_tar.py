"""Tar archives as streams, damaged ones among them."""

import io
import tarfile

import pytest

from ldm.io import tar
from ldm.io.tar import BadTar, iterate_tar, open_tar

FILES = {"a/1.txt": b"first", "a/2.txt": b"x" * 3000, "b.bin": b"", "b/3.txt": b"third"}


def archive(files=FILES, mode="w", **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(data, wanted=lambda name: True):
    reasons = []
    members = iterate_tar(open_tar(io.BytesIO(data)), reasons.append)
    return {member.name: member.read() for member in members if wanted(member.name)}, reasons


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_all_formats_are_read(mode, kind):
    assert contents(archive(mode=mode, format=kind)) == (FILES, [])


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read(kind):
    files = {"d" * 90 + "/" + "n" * 150 + ".txt": b"long", "größe/日本.txt": b"foreign", "plain.txt": b"plain"}
    assert contents(archive(files, format=kind)) == (files, [])


def test_files_on_disk_skip_what_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(archive())
    with open(path, "rb") as file:
        found = {m.name: m.read() for m in iterate_tar(open_tar(file), pytest.fail) if m.name.startswith("b")}
    assert found == {name: FILES[name] for name in ("b.bin", "b/3.txt")}
    assert contents(path.read_bytes(), lambda name: name == "b/3.txt") == ({"b/3.txt": b"third"}, [])


def test_offsets_are_those_of_the_contents():
    data = archive()
    for member in iterate_tar(open_tar(io.BytesIO(data)), pytest.fail):
        assert data[member.offset : member.offset + member.size] == FILES[member.name]


def test_links_folders_and_devices_are_left_out():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for name, kind in {"dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "tty": tarfile.CHRTYPE}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            out.addfile(info)
        info = tarfile.TarInfo("file")
        info.size = 3
        out.addfile(info, io.BytesIO(b"abc"))
    assert contents(buffer.getvalue()) == ({"file": b"abc"}, [])


def test_damaged_header_loses_only_its_member():
    data = bytearray(archive())
    start = data.index(b"a/2.txt")
    data[start : start + 100] = b"\xff" * 100
    found, reasons = contents(bytes(data))
    assert found == {name: FILES[name] for name in FILES if name != "a/2.txt"}
    assert reasons == [f"has a damaged header at byte {start:,}"]


def test_archive_that_ends_within_a_member_keeps_the_earlier_ones():
    data = archive()
    cut = data[: data.index(b"third") + 2]
    found = {}
    with pytest.raises(BadTar, match=r"^is cut short$"):
        for member in iterate_tar(open_tar(io.BytesIO(cut)), pytest.fail):
            found[member.name] = member.read()
    assert found == {name: FILES[name] for name in FILES if name != "b/3.txt"}


def test_archive_that_ends_within_a_header_is_reported():
    data = archive()
    found, reasons = contents(data[: data.index(b"b/3.txt") + 100])
    assert list(found) == ["a/1.txt", "a/2.txt", "b.bin"] and reasons == ["is cut short"]


@pytest.mark.parametrize("data", [b"", b"<html>" * 400, b"PK\x03\x04" + bytes(2000).replace(b"\0", b"z")])
def test_other_file_is_not_a_tar_archive(data):
    with pytest.raises(BadTar, match=r"^is not a tar archive$"):
        contents(data)


def test_damaged_compression_is_an_error_after_the_intact_members():
    data = archive({str(i): bytes(range(256)) * 400 for i in range(40)}, mode="w:gz")
    damaged = data[: len(data) // 2] + b"\0" * 50 + data[len(data) // 2 + 50 :]
    names = []
    with pytest.raises(BadTar):
        for member in iterate_tar(open_tar(io.BytesIO(damaged)), lambda reason: None):
            names.append(member.name)
    assert names == [str(i) for i in range(len(names))] and names


def test_member_of_a_hostile_size_is_refused_without_memory(monkeypatch):
    info = tarfile.TarInfo("huge")
    info.size = 1 << 62
    data = info.tobuf(tarfile.GNU_FORMAT) + b"content"
    (member,) = iterate_tar(open_tar(io.BytesIO(data)), pytest.fail)
    with pytest.raises(BadTar, match=f"^has {1 << 62:,} bytes, more than"):
        member.read()
    monkeypatch.setattr(tar, "MAX_MEMBER", 1 << 63)
    (member,) = iterate_tar(open_tar(io.BytesIO(data)), lambda reason: None)


def test_concatenated_header_blocks_end_at_two_empty_ones():
    assert contents(archive() + b"rubbish" * 1000)[0] == FILES
