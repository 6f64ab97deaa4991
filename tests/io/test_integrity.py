"""Hashes inside checkpoints, and saves that are interrupted."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from ldm.errors import UserError
from ldm.io.checkpoint.integrity import append_hash, check_intact
from ldm.io.checkpoint.writing import save_atomically
from ldm.io.files import remove_temporary_files


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    save_atomically({"state_dict": {"weight": torch.arange(1000.0)}, "global_step": 3}, path)
    return path


def test_other_programs_read_a_checkpoint_with_a_hash(checkpoint):
    for mmap in (False, True):
        content = torch.load(checkpoint, weights_only=True, mmap=mmap)
        assert content["global_step"] == 3 and torch.equal(content["state_dict"]["weight"], torch.arange(1000.0))
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:") and len(archive.comment) == 71
    check_intact(checkpoint)


def test_every_changed_byte_is_found(checkpoint):
    content = checkpoint.read_bytes()
    # The last record of an archive: its length of the comment decides whether there is a hash.
    for position in {*range(0, len(content) - 95, 97), *range(len(content) - 95, len(content) - 73), len(content) - 1}:
        checkpoint.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(UserError, match=r'last\.ckpt" is damaged: its content differs from its checksum'):
            check_intact(checkpoint)


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_truncated_file_is_found(size, checkpoint):
    os.truncate(checkpoint, size)
    with pytest.raises(UserError, match="is damaged"):
        check_intact(checkpoint)


def test_checkpoint_without_hash_is_checked_by_its_archive(tmp_path):
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(1000)}}, path)
    check_intact(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        check_intact(path)


def test_other_formats_get_no_hash(tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    append_hash(path)
    assert path.read_bytes() == content
    check_intact(path)


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from ldm.io.checkpoint.integrity import check_intact
from ldm.io.checkpoint.writing import save_atomically
from ldm.io.files import remove_temporary_files

torch.set_num_threads(1)
folder, random_numbers = Path(sys.argv[1]), random.Random(0)
path, step, saved, interrupted = folder / "last.ckpt", 0, -1, 0
weights = torch.zeros(200_000)
for kill in range(100):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        while True:
            save_atomically({"state_dict": {"weight": weights + step}, "global_step": step}, path)
            os.write(writer, step.to_bytes(8, "little"))
            step += 1
    os.close(writer)
    time.sleep(random_numbers.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reader, "rb") as file:
        acknowledged = file.read()
    if acknowledged:
        saved = int.from_bytes(acknowledged[-8:], "little")
    interrupted += any(folder.glob(".*.tmp"))
    remove_temporary_files(folder)
    if saved >= 0:
        check_intact(path)
        content = torch.load(path, weights_only=True)
        assert content["global_step"] in (saved, saved + 1), (content["global_step"], saved)
        assert (content["state_dict"]["weight"] == content["global_step"]).all()
        saved, step = content["global_step"], content["global_step"] + 1
print(json.dumps([saved, interrupted]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_100_kills_while_saving_lose_nothing(tmp_path, repo_root):
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved, interrupted = json.loads(done.stdout)
    assert saved > 10 and interrupted > 10


def test_files_of_killed_processes_are_removed(tmp_path):
    for name in (".123-0a1b2c3d.tmp", ".notes.tmp", "last.ckpt", ".x-0a1b2c3d.tmp"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".notes.tmp", "last.ckpt", ".x-0a1b2c3d.tmp"}
    remove_temporary_files(tmp_path / "missing")
