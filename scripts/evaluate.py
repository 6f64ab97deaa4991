"""Measure samples, reconstructions and restorations: the script of `ldm evaluate`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
