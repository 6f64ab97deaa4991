"""Hide the warnings and log lines of Pillow while an image is read: files with flaws are read all the same."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_FILTER = ("ignore", None, Warning, re.compile(r"PIL(\.|$)"), 0)
_LOGGER = logging.getLogger("PIL")

_lock = threading.Lock()
_readers = 0  # blocks of all threads that are inside `hidden`
_propagates = True


@contextmanager
def hidden() -> Iterator[None]:
    """Hide Pillow's warnings and log lines inside the block.

    `warnings.catch_warnings` is not used, because blocks of several threads that overlap would leave its filters
    behind. Here the first block adds one filter, and the last one removes it.
    """
    global _readers, _propagates
    with _lock:
        _readers += 1
        if _readers == 1:
            warnings.filterwarnings("ignore", module=_FILTER[3].pattern)
            if not _LOGGER.handlers:
                _LOGGER.addHandler(logging.NullHandler())  # without any handler, logging writes to stderr
            _propagates, _LOGGER.propagate = _LOGGER.propagate, False
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                _LOGGER.propagate = _propagates
                filters = warnings.filters
                if isinstance(filters, list) and _FILTER in filters:  # the program may have reset all filters
                    filters.remove(_FILTER)
