"""Freed memory stays with the process, which then needs no new pages."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from ldm.training.allocator import keep_freed_memory

PAGES_OF_TEN_BLOCKS = """
import resource, sys
from ldm.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def fill(): return len(bytes(b"x") * (64 << 20))  # every page is written to
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def has_mallopt() -> bool:
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not has_mallopt(), reason="the C library has no mallopt")
def test_freed_blocks_are_reused(repo_root):
    def pages(mode: str) -> int:
        command = [sys.executable, "-c", PAGES_OF_TEN_BLOCKS, mode]
        return int(subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True).stdout)

    assert 10 * pages("keep") < pages("leave")


def test_other_systems_are_unchanged(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
