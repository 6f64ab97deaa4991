"""How the C library hands out memory on the CPU."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
LARGEST = 2**31 - 1
ROOM = 2**28  # bytes that the heap grows by at least


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next tensor; says whether it could be arranged.

    glibc gives large blocks back to the kernel as soon as they are freed, and every tensor then starts with fresh
    pages, which the kernel has to zero: in training a small U-Net a quarter of the time. Other C libraries are left
    alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(name, value) for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, ROOM))
    )
