"""Train a model from YAML configurations: `python main.py --base CONFIG.yaml -t`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ldm.cli.command import command
from ldm.config.targets import MAIN_NAMES
from ldm.training import options

# Public names that configurations give as `target: main.NAME`. They live in ldm.training, so that running this
# file as a program and importing it as a module give the same classes.


def __getattr__(name: str) -> Any:
    if name not in MAIN_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(MAIN_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MAIN_NAMES])


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, refuse what cannot work, and train.

    Raises:
        UserError: anything that the user can mend; nothing has been written then.
    """
    chosen = options.parse(argv)
    from ldm.training import configuration

    plan = configuration.plan(chosen)
    from ldm.training.run import run

    run(plan)


if __name__ == "__main__":
    sys.exit(main())
