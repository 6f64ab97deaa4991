"""Locate the files that this project ships (configurations, models, data), and the folder for downloads.

In a checkout they are in the repository. An installed package contains them in `ldm/assets`.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
REPOSITORY = _PACKAGE.parent  # of a checkout; the folder of all packages otherwise
IS_CHECKOUT = (REPOSITORY / "pyproject.toml").is_file() and (REPOSITORY / "configs").is_dir()
ROOT = REPOSITORY if IS_CHECKOUT else _PACKAGE / "assets"


def downloads_root() -> Path:
    """Return the folder whose `models` and `data` receive downloads.

    The environment variable `LDM_HOME` sets it. The default is the repository in a checkout, and `~/.cache/ldm` for an
    installed package.
    """
    chosen = os.environ.get("LDM_HOME")
    if chosen:
        return Path(chosen).expanduser()
    if IS_CHECKOUT:
        return ROOT
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "ldm"


def search_path() -> list[Path]:
    """Return the folders in which a relative path is looked up: working folder, downloads, shipped files."""
    return list(dict.fromkeys([Path(), downloads_root(), ROOT]))


def locate(path: str | Path) -> Path:
    """Return the first existing file or folder called `path` on the search path, else `path` as given."""
    return next((found for base in search_path() if (found := base / path).exists()), Path(path))
