"""Folder of a run: who gets it, and the configurations in it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm.errors import UserError
from ldm.io.checkpoint.writing import save_atomically
from ldm.training.run_folder import (
    FOLDER_VARIABLE,
    find_run,
    is_first_process,
    locked_run,
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


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run with a last checkpoint, two others to resume from, and weights."""
    folder = tmp_path / "run"
    for name, step in {"last": 30, "epoch=000001": 20, "epoch=000000": 10}.items():
        content = {"state_dict": {"weight": torch.ones(1000)}, "optimizer_states": [{}], "global_step": step}
        save_atomically(content, folder / "checkpoints" / f"{name}.ckpt")
    save_atomically({"state_dict": {}, "global_step": 40}, folder / "checkpoints" / "weights.ckpt")
    return folder


def damage(path):
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)


def test_run_resumes_from_its_newest_intact_checkpoint(run, caplog):
    checkpoints = run / "checkpoints"
    assert find_run(run) == (run, checkpoints / "last.ckpt") and not caplog.records
    damage(checkpoints / "last.ckpt")
    assert find_run(run) == (run, checkpoints / "epoch=000001.ckpt")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        f'"{checkpoints / "last.ckpt"}" is damaged: its content differs from its checksum; '
        f'resuming from "{checkpoints / "epoch=000001.ckpt"}" of step 20'
    )
    os.truncate(checkpoints / "epoch=000001.ckpt", 1000)
    assert find_run(run) == (run, checkpoints / "epoch=000000.ckpt")
    (checkpoints / "last.ckpt").unlink()
    caplog.clear()
    assert find_run(run) == (run, checkpoints / "epoch=000000.ckpt")
    assert 'last.ckpt" does not exist; resuming from "' in caplog.text


def test_run_without_intact_checkpoint_is_an_error(run):
    for path in (run / "checkpoints").glob("[le]*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r'^cannot resume from ".*last.ckpt" is damaged: .*; the run has no other'):
        find_run(run)
    with pytest.raises(UserError, match=r'^cannot resume from ".*epoch=000000.ckpt" is damaged: its content differs'):
        find_run(run / "checkpoints" / "epoch=000000.ckpt")


HOLD = """
import os, pathlib, sys, time
from ldm.training.run_folder import locked_run

with locked_run(pathlib.Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker of a data loader
        time.sleep(30)
        os._exit(0)
    print("locked", flush=True)
    time.sleep(30)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_run_is_trained_by_one_process_at_a_time(run, repo_root, monkeypatch):
    """The lock ends with its process, even if that was killed and its workers go on."""
    (run / "checkpoints" / ".123-0a1b2c3d.tmp").touch()
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    command = [sys.executable, "-c", HOLD, str(run)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout.readline() == "locked\n"
        assert not list((run / "checkpoints").glob(".*.tmp"))
        with pytest.raises(UserError, match=r'another process trains the run ".*run"; wait for its end, or stop it$'):
            locked_run(run).__enter__()
        with monkeypatch.context() as patch:
            patch.setenv("LOCAL_RANK", "1")
            with locked_run(run):  # another process of the same run
                pass
        process.kill()
        process.wait()
        with locked_run(run):
            pass
    finally:
        os.killpg(process.pid, 9)
        process.communicate()
    assert not (run / ".lock").exists()
