"""Reading a checkpoint never runs code, and every malformed file raises an error of one line."""

from __future__ import annotations

import copyreg
import os
import pickle
import random
import sys
import warnings
from pathlib import Path

import pytest
from hostile_files import EXTENSION, WEIGHTS, damaged, good_safetensors, hostile, in_zip, pickles, saved, text

from ldm.errors import UserError
from ldm.io.checkpoint.reading import read_checkpoint, read_state_dict

NAMES = sorted(hostile(Path("trap")))
DAMAGED = damaged()


@pytest.fixture
def trap(tmp_path):
    """Folder that the code in a hostile file would create."""
    copyreg.add_extension("os", "mkdir", EXTENSION)
    copyreg._extension_cache.pop(EXTENSION, None)
    yield tmp_path / "trap"
    copyreg.remove_extension("os", "mkdir", EXTENSION)


def test_there_are_enough_hostile_files():
    assert len(NAMES) > 60 and len(DAMAGED) > 60


@pytest.mark.parametrize("name", sorted(pickles(Path("trap"))))
def test_the_pickles_run_code_when_loaded_carelessly(name, trap):
    """`pickle.loads` runs the code in each file, so that the next test could fail."""
    pickle.loads(pickles(trap)[name])
    assert trap.is_dir()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_no_file_runs_code(name, suffix, trap, tmp_path):
    path = tmp_path / f"file{suffix}"
    path.write_bytes(hostile(trap)[name])
    for read in (read_checkpoint, read_state_dict):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            refused(read, path)
    assert not trap.exists()


@pytest.mark.parametrize("name", DAMAGED)
def test_every_fault_is_an_error_of_one_line(name, tmp_path):
    content, message = DAMAGED[name]
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    assert message in refused(read_state_dict, path)


def refused(read, path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and ";" in message
    assert message.isprintable() and len(message) < 400 + len(str(path))
    return message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(read_checkpoint, tmp_path / "pipe")


def test_names_of_lightning_import_nothing(trap, tmp_path):
    """Names that start like those of Lightning are replaced and not looked up."""
    before = set(sys.modules)
    for body in (b"cpytorch_lightning.os\nmkdir\n", b"cpytorch_lightning\nos.mkdir\n", b"clightning.os\nmkdir\n"):
        path = tmp_path / "file.ckpt"
        path.write_bytes(in_zip(b"\x80\x02}" + text("x") + body + text(str(trap)) + b"\x85Rs."))
        assert type(read_checkpoint(path)["x"]).__module__ == "ldm.io.checkpoint.reading"
    assert not trap.exists() and not {name for name in set(sys.modules) - before if "lightning" in name}


@pytest.mark.parametrize("kind", ["zip", "old file", "safetensors"])
def test_changed_bytes_are_read_or_refused(kind, tmp_path):
    """A good file with random changes is read or raises `UserError`."""
    good = {"zip": saved({"state_dict": WEIGHTS}), "old file": saved(WEIGHTS, new=False)}
    content, generator = good.get(kind) or good_safetensors(), random.Random(0)
    path, outcomes = tmp_path / "file.ckpt", set()
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 2, 5))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            read_state_dict(path)
            outcomes.add("read")
        except UserError as error:
            assert str(error).isprintable()
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
