"""Tests of `ldm.io.folders`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.io.folders import list_files, list_files_below

PNG = (".png",)
IGNORED = ("._a.png", ".hidden.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints/a.png")


def touch(folder: Path, *names: str) -> Path:
    """Create empty files, and return their folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def link(path: Path, target: Path) -> None:
    path.symlink_to(target, target_is_directory=True)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three images, one of them in a subfolder."""
    return touch(tmp_path / "images", "b.png", "a.PNG", "deep/c.png")


def below(folder: Path) -> list[str]:
    return list_files_below(folder, PNG).files


def test_files_are_sorted_by_name(folder):
    touch(folder, "B.png", "a-1.png", "deep/a.png", "deep-1.png")
    listing = list_files(folder, PNG)
    assert listing.files == ["B.png", "a-1.png", "a.PNG", "b.png", "deep-1.png"] and listing.others == []
    assert listing.paths == [folder / name for name in listing.files]
    assert below(folder) == ["B.png", "a-1.png", "a.PNG", "b.png", "deep-1.png", "deep/a.png", "deep/c.png"]


def test_hidden_and_system_files_are_neither_listed_nor_counted(folder):
    touch(folder, *IGNORED, *(f"deep/{name}" for name in IGNORED))
    assert list_files(folder, PNG).files == ["a.PNG", "b.png"] and list_files(folder, PNG).others == []
    listing = list_files_below(folder, PNG)
    assert listing.files == ["a.PNG", "b.png", "deep/c.png"] and listing.others == []


def test_a_hidden_folder_can_be_listed_itself(tmp_path):
    assert below(touch(tmp_path / ".cache", "a.png")) == ["a.png"]


def test_other_files_are_counted_in_one_line(folder, caplog):
    caplog.set_level("INFO", "ldm")
    list_files_below(folder, PNG).log_others("images")
    assert not caplog.messages
    touch(folder, "z.txt")
    list_files_below(folder, PNG).log_others("images")
    assert caplog.messages == [f'passed over 1 file in "{folder}" besides the images: z.txt']
    touch(folder, "deep/y.txt", "x.md", "w")
    caplog.clear()
    list_files_below(folder, PNG).log_others("images")
    assert caplog.messages == [f'passed over 4 files in "{folder}" besides the images: deep/y.txt, w, x.md, …']
    assert list_files(folder, PNG).others == ["w", "x.md", "z.txt"]


def test_a_folder_whose_name_has_the_suffix_is_no_file(folder):
    touch(folder, "d.png/e.png")
    assert list_files(folder, PNG).files == ["a.PNG", "b.png"] and list_files(folder, PNG).others == []
    assert below(folder) == ["a.PNG", "b.png", "d.png/e.png", "deep/c.png"]


# -- links -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["up", "deep/up", "deep/self"])
@pytest.mark.parametrize("target", ["images", ".", "/"])
def test_a_link_to_a_folder_that_contains_it_is_not_followed(folder, tmp_path, place, target):
    touch(tmp_path, "beside/d.png", "e.png")
    link(folder / place, tmp_path / target)
    link(folder / "deep" / "again", folder)
    assert below(folder) == ["a.PNG", "b.png", "deep/c.png"]


def test_a_linked_folder_is_followed_once(folder, tmp_path):
    touch(tmp_path / "other", "d.png", "inner/e.png")
    link(folder / "z", tmp_path / "other")
    link(folder / "y", tmp_path / "other")
    link(folder / "deep" / "x", tmp_path / "other" / "inner")
    assert below(folder) == ["a.PNG", "b.png", "deep/c.png", "deep/x/e.png", "y/d.png"]


def test_the_path_without_links_is_listed(folder):
    link(folder / "another", folder / "deep")
    assert below(folder) == ["a.PNG", "b.png", "deep/c.png"]


def test_linked_folders_may_link_back_and_to_each_other(folder, tmp_path):
    other = touch(tmp_path / "elsewhere" / "other", "d.png")
    third = touch(tmp_path / "third", "e.png")
    link(folder / "other", other)
    link(other / "up", other.parent)
    link(other / "back", folder)
    link(other / "third", third)
    link(third / "other", other)
    assert below(folder) == ["a.PNG", "b.png", "deep/c.png", "other/d.png", "other/third/e.png"]


def test_a_link_to_a_file_is_a_file(folder, tmp_path):
    (folder / "d.png").symlink_to(touch(tmp_path, "e.png") / "e.png")
    assert below(folder) == ["a.PNG", "b.png", "d.png", "deep/c.png"]


def test_broken_links_are_other_files_and_named(folder, tmp_path, caplog):
    link(folder / "gone.png", tmp_path / "nowhere")
    link(folder / "self.png", folder / "self.png")
    link(folder / "text.txt", tmp_path / "nowhere")
    for function in (list_files, list_files_below):
        caplog.clear()
        listing = function(folder, PNG)
        assert listing.others == ["gone.png", "self.png", "text.txt"] and "gone.png" not in listing.files
        assert caplog.messages == [f'2 links in "{folder}" to files that do not exist: gone.png, self.png']


def test_names_of_several_lines_are_shown_in_one(folder, caplog):
    caplog.set_level("INFO", "ldm")
    touch(folder, "a\nb.txt", "\x1b[31m.txt")
    list_files(folder, PNG).log_others("images")
    assert caplog.messages == [f'passed over 2 files in "{folder}" besides the images: \\x1b[31m.txt, a\\nb.txt']


def test_a_linked_root_is_listed(folder, tmp_path):
    link(tmp_path / "root", folder)
    link(folder / "deep" / "up", tmp_path / "root")
    assert below(tmp_path / "root") == ["a.PNG", "b.png", "deep/c.png"]


# -- errors ----------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_listed_raises_user_error(tmp_path):
    for function in (list_files, list_files_below):
        with pytest.raises(UserError, match=r"cannot list the folder .*none"):
            function(tmp_path / "none", PNG)


def test_a_subfolder_that_cannot_be_listed_is_reported(folder, monkeypatch, caplog):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert below(folder) == ["a.PNG", "b.png"]
    [message] = caplog.messages
    assert message.startswith(f'cannot list the folder "{folder}/deep": Permission denied')
