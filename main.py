"""Train a model from YAML configurations: the published name of `ldm train`."""

from __future__ import annotations

import sys

from ldm.cli.train import main
from ldm.cli.train import make_parser as get_parser
from ldm.compat import published_names
from ldm.config.targets import MAIN_NAMES

__all__ = ["get_parser", "main"]

# Configurations name these classes as `target: main.NAME`. They are defined in ldm.training, so that the program and
# the module `main` share the same classes.
__getattr__ = published_names("main", MAIN_NAMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *MAIN_NAMES])


if __name__ == "__main__":
    sys.exit(main())
