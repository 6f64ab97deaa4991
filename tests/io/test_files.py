"""Files and folders are written completely or not at all, and new ones replace nothing."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm.errors import DiskFullError, UserError
from ldm.io.files import atomic_folder, atomic_path, locked, reserve_folder, variants, write_new


def contents(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_replaces_the_old_one(tmp_path):
    for number in range(2):
        with atomic_folder(tmp_path / "new" / "folder") as folder:
            (folder / f"file{number}").write_text(str(number))
    assert contents(tmp_path) == {"new/folder/file1": "1"}
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_a_symbolic_link_to_a_folder_is_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"file": "new"}
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_a_folder_is_unchanged_when_the_block_fails(tmp_path, error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    with pytest.raises(UserError if error is OSError else error), atomic_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("half")
        raise error
    assert contents(tmp_path) == {"folder/file": "old"} and os.listdir(tmp_path) == ["folder"]


def test_a_folder_is_unchanged_when_it_cannot_be_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    with pytest.raises(UserError, match="choose another place"), atomic_folder(tmp_path / "folder") as folder:
        folder.rmdir()  # renaming it fails then, after the old folder was renamed
    assert contents(tmp_path) == {"folder/file": "old"} and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("writing", [atomic_path, atomic_folder])
def test_an_unwritable_path_raises_user_error(tmp_path, writing):
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r'cannot write ".*inside": .*; choose another place')
    with refused, writing(tmp_path / "file" / "inside"):
        pass


# -- files that no other process may replace ----------------------------------------------------------------------


def numbered(folder):
    return (folder / f"{number:02}.txt" for number in itertools.count())


def without_links(*args, **options):
    raise PermissionError(1, "Operation not permitted")  # as on FAT


LINKS = pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])


@pytest.fixture
def file_system(monkeypatch):
    def choose(links: bool) -> None:
        if not links:
            monkeypatch.setattr(os, "link", without_links)

    return choose


@LINKS
def test_writers_at_the_same_time_have_files_of_their_own(tmp_path, file_system, links):
    file_system(links)
    start = threading.Barrier(8)

    def write(name: str) -> list[Path]:
        start.wait()
        return [
            write_new(numbered(tmp_path / "out"), lambda path, i=i: path.write_text(f"{name}{i}")) for i in range(5)
        ]

    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(write, "abcdefgh"))
    for name, paths in zip("abcdefgh", written, strict=True):
        assert [path.read_text() for path in paths] == [f"{name}{i}" for i in range(5)]
        assert paths == sorted(paths)
    assert sorted(os.listdir(tmp_path / "out")) == [f"{number:02}.txt" for number in range(40)]


@LINKS
def test_a_new_file_appears_complete_and_never_replaces_another(tmp_path, file_system, links):
    file_system(links)
    (tmp_path / "00.txt").write_text("old")
    (tmp_path / "01.txt").symlink_to("nowhere")

    def write(path):
        path.write_text("half")
        assert sorted(name for name in os.listdir(tmp_path) if not name.startswith(".")) == ["00.txt", "01.txt"]
        path.write_text("whole")

    assert write_new(numbered(tmp_path), write) == tmp_path / "02.txt"
    assert (tmp_path / "00.txt").read_text() == "old" and (tmp_path / "02.txt").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["00.txt", "01.txt", "02.txt"]
    with pytest.raises(FileExistsError):
        write_new([tmp_path / "00.txt", tmp_path / "02.txt"], write_nothing)
    assert sorted(os.listdir(tmp_path)) == ["00.txt", "01.txt", "02.txt"]


def write_nothing(path):
    path.touch()


@LINKS
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_new_file_is_absent_when_writing_fails(tmp_path, file_system, links, error):
    file_system(links)

    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_new(numbered(tmp_path), fail)
    assert not os.listdir(tmp_path)


@LINKS
def test_a_file_that_appears_during_writing_is_kept(tmp_path, file_system, links):
    file_system(links)
    target = tmp_path / "model.ckpt"
    refused = pytest.raises(UserError, match=r'cannot write ".*model\.ckpt": File exists')
    with refused, atomic_path(target, replace=False) as temporary:
        temporary.write_text("mine")
        target.write_text("of another process")
    assert contents(tmp_path) == {"model.ckpt": "of another process"}


@LINKS
@pytest.mark.parametrize("writing", [atomic_path, atomic_folder, lambda path: atomic_path(path, replace=False)])
def test_names_have_any_length_that_the_file_system_allows(tmp_path, file_system, links, writing):
    file_system(links)
    for name in ("a" * 255, "é" * 127 + "x"):
        with writing(tmp_path / name) as temporary:
            temporary.touch()
        assert (tmp_path / name).exists()
    refused = pytest.raises(UserError, match=r'cannot write ".*": File name too long; choose a shorter name')
    with refused, writing(tmp_path / ("a" * 256)) as temporary:
        temporary.touch()
    assert len(os.listdir(tmp_path)) == 2


def test_variants_are_numbered_before_the_suffix(tmp_path):
    assert [path.name for path in itertools.islice(variants(tmp_path / "v1.5.png"), 3)] == [
        "v1.5.png",
        "v1.5-1.png",
        "v1.5-2.png",
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_its_own_error(tmp_path, code):
    def full(path):
        raise OSError(code, os.strerror(code))

    with pytest.raises(DiskFullError, match=os.strerror(code)):
        write_new([tmp_path / "a"], full)
    with pytest.raises(DiskFullError, match=os.strerror(code)), atomic_path(tmp_path / "a") as temporary:
        full(temporary)
    with pytest.raises(UserError) as other, atomic_path(tmp_path / "a"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert other.type is UserError and not os.listdir(tmp_path)


def test_processes_at_the_same_time_reserve_folders_of_their_own(tmp_path):
    start = threading.Barrier(8)

    def reserve(_) -> Path:
        start.wait()
        return reserve_folder(tmp_path / "logs" / "run")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(reserve, range(8)))
    assert sorted(folder.name for folder in folders) == ["run", *(f"run_{number}" for number in range(1, 8))]
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_reserved_raises_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r'cannot write ".*run"'):
        reserve_folder(tmp_path / "file" / "run")
    assert reserve_folder(tmp_path / "file") == tmp_path / "file_1"


def test_a_lock_excludes_others_until_it_is_released(tmp_path):
    lock = tmp_path / "new" / "lock"
    for _ in range(2):
        with locked(lock, "another process is busy"):
            with pytest.raises(UserError, match="another process is busy"), locked(lock, "another process is busy"):
                pass
            assert lock.exists()
        assert not os.listdir(tmp_path / "new")


def test_a_lock_can_be_waited_for(tmp_path, caplog):
    lock, events = tmp_path / "lock", []

    def wait():
        with locked(lock, "another process is busy", wait=True):
            events.append("waited")

    thread = threading.Thread(target=wait)
    with locked(lock, "another process is busy"):
        thread.start()
        thread.join(0.2)
        events.append("released")
    thread.join(10)
    assert events == ["released", "waited"] and not lock.exists()
    assert caplog.messages == ["another process is busy; waiting until it has finished"]
