"""Train a model from YAML configurations: the published name of `ldm train`."""

from __future__ import annotations

import sys
from typing import Any

from ldm.cli.train import main
from ldm.config.targets import MAIN_NAMES

# Configurations name these classes as `target: main.NAME`. They are defined in ldm.training, so that the program and
# the module `main` share the same classes.


def __getattr__(name: str) -> Any:
    if name not in MAIN_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(MAIN_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MAIN_NAMES])


if __name__ == "__main__":
    sys.exit(main())
