"""Folder of a run: who gets it, and the configurations in it."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from ldm.training.run_folder import (
    FOLDER_VARIABLE,
    is_first_process,
    reserved_folder,
    save_configuration,
    saved_configurations,
    saved_options,
)

RANKS = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*RANKS, FOLDER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def test_each_run_gets_a_folder_of_its_own(tmp_path):
    path = tmp_path / "logs" / "run"
    with reserved_folder(path) as first, reserved_folder(path) as second:
        assert (first, second) == (path, tmp_path / "logs" / "run_1")
        (second / "file").touch()
    assert [file.name for file in path.parent.iterdir()] == ["run_1"]


def test_empty_folder_and_its_new_parents_are_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), reserved_folder(tmp_path / "a" / "b" / "run") as folder:
        assert folder.is_dir()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_launched_process_uses_the_folder_of_the_first(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    with reserved_folder(tmp_path / "run") as first:
        monkeypatch.setenv("LOCAL_RANK", "1")
        with reserved_folder(tmp_path / "run") as other:
            assert other == first == tmp_path / "run_1"
        assert first.is_dir()


def test_process_on_another_machine_creates_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with reserved_folder(tmp_path / "run") as folder:
        assert folder == tmp_path / "run" and not folder.exists()


def test_run_that_a_run_starts_reserves_its_own_folder(tmp_path, monkeypatch):
    with reserved_folder(tmp_path / "run"):
        monkeypatch.setenv("LOCAL_RANK", "0")  # Lightning sets it in the first process
        with reserved_folder(tmp_path / "other") as other:
            assert other == tmp_path / "other"


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"GROUP_RANK": "1"}, False),
        ({"RANK": "0", "GROUP_RANK": "1"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
    ids=str,
)
def test_first_process_is_the_first_of_all_machines(ranks, expected, monkeypatch):
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is expected


def save(folder, now, value):
    parts = {
        "project": {"model": {"x": value}},
        "lightning": {"lightning": {}},
        "options": {"options": {"seed": value}},
    }
    save_configuration(folder / "configs", now, parts)


def test_newest_configuration_replaces_older_ones(tmp_path):
    for value, day in enumerate(("01", "02", "03")):
        save(tmp_path, f"2025-01-{day}T00-00-00", value)
    (tmp_path / "configs" / "own.yaml").write_text("model: {y: 1}")
    assert [file.name for file in saved_configurations(tmp_path)] == [
        "2025-01-03T00-00-00-lightning.yaml",
        "2025-01-03T00-00-00-project.yaml",
        "own.yaml",
    ]
    assert OmegaConf.load(saved_options(tmp_path)) == {"options": {"seed": 2}}


def test_published_run_without_options_has_its_configurations(tmp_path):
    save(tmp_path, "2021-12-13T00-00-00", 1)
    saved_options(tmp_path).unlink()
    assert saved_options(tmp_path) is None
    assert len(saved_configurations(tmp_path)) == 2


def test_configuration_is_the_newest_after_the_clock_was_set_back(tmp_path):
    save(tmp_path, "2025-10-26T02-50-00", 1)
    save(tmp_path, "2025-10-26T02-10-00", 2)
    (project,) = (file for file in saved_configurations(tmp_path) if file.name.endswith("project.yaml"))
    assert OmegaConf.load(project) == {"model": {"x": 2}}


def test_hidden_files_are_no_configurations(tmp_path):
    """macOS writes such files beside others on foreign disks."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("2024-05-06T07-08-09-project.yaml", "._2024-05-06T07-08-09-project.yaml", "mine.yaml", "._mine.yaml"):
        (folder / name).write_text("model: {}\n")
    assert [path.name for path in saved_configurations(tmp_path)] == ["2024-05-06T07-08-09-project.yaml", "mine.yaml"]
