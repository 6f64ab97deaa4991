"""Diagnose a trained model: the script of `ldm doctor`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
