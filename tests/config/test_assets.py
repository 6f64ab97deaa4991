"""Folders of shipped files and downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.config import assets


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Folder of the assets of an installed package, with the working folder and the downloads elsewhere."""
    monkeypatch.setattr(assets, "IS_CHECKOUT", False)
    monkeypatch.setattr(assets, "ROOT", tmp_path / "assets")
    monkeypatch.setenv("LDM_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "assets"


def test_a_checkout_keeps_downloads_in_the_repository(repo_root, monkeypatch):
    monkeypatch.delenv("LDM_HOME", raising=False)
    assert assets.IS_CHECKOUT and repo_root == assets.ROOT == assets.downloads_root()
    assert assets.search_path() == [Path(), repo_root]


def test_an_environment_variable_chooses_the_folder_of_downloads(monkeypatch):
    monkeypatch.setenv("LDM_HOME", "~/weights")
    assert assets.downloads_root() == Path.home() / "weights"


@pytest.mark.parametrize(("cache", "folder"), [("/caches", Path("/caches/ldm")), ("", Path.home() / ".cache/ldm")])
def test_an_installed_package_keeps_downloads_in_a_cache_folder(installed, monkeypatch, cache, folder):
    monkeypatch.delenv("LDM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert assets.downloads_root() == folder


def test_the_first_existing_file_on_the_search_path_is_located(installed, tmp_path):
    assert assets.locate("data/x.txt") == Path("data/x.txt")
    for base in (installed, tmp_path / "home", Path()):
        (base / "data").mkdir(parents=True)
        (base / "data" / "x.txt").touch()
        assert assets.locate("data/x.txt") == base / "data" / "x.txt"
