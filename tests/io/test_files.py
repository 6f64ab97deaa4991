"""Files and folders are written completely or not at all."""

from __future__ import annotations

import os

import pytest

from ldm.errors import UserError
from ldm.io.files import atomic_folder, atomic_path


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
