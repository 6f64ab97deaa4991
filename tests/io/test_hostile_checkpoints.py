"""No file runs code, and every file that is no checkpoint is refused with its cause in one line."""

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
    """The folder that appears when the code in a file runs."""
    copyreg.add_extension("os", "mkdir", EXTENSION)
    copyreg._extension_cache.pop(EXTENSION, None)
    yield tmp_path / "trap"
    copyreg.remove_extension("os", "mkdir", EXTENSION)


def test_there_are_enough_of_them():
    assert len(NAMES) > 60 and len(DAMAGED) > 60


@pytest.mark.parametrize("name", sorted(pickles(Path("trap"))))
def test_the_traps_work(name, trap):
    """Opened the careless way each of these pickles runs its code, so that the next test can fail."""
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
def test_every_flaw_is_told_in_one_line(name, tmp_path):
    content, said = DAMAGED[name]
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    assert said in refused(read_state_dict, path)


def refused(read, path) -> str:
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and ";" in message
    assert message.isprintable() and len(message) < 400 + len(str(path))
    return message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no ordinary file" in refused(read_checkpoint, tmp_path / "pipe")


def test_the_name_of_a_lightning_class_opens_nothing(trap, tmp_path):
    """Names of Lightning's get stand-ins, whatever stands behind them."""
    before = set(sys.modules)
    for body in (b"cpytorch_lightning.os\nmkdir\n", b"cpytorch_lightning\nos.mkdir\n", b"clightning.os\nmkdir\n"):
        path = tmp_path / "file.ckpt"
        path.write_bytes(in_zip(b"\x80\x02}" + text("x") + body + text(str(trap)) + b"\x85Rs."))
        assert type(read_checkpoint(path)["x"]).__module__ == "ldm.io.checkpoint.reading"
    assert not trap.exists() and not {name for name in set(sys.modules) - before if "lightning" in name}


@pytest.mark.parametrize("kind", ["zip", "old file", "safetensors"])
def test_changed_bytes_are_told_or_do_not_matter(kind, tmp_path):
    """Whatever is changed in a good file, it is read or refused; nothing else happens."""
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
