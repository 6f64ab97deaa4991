"""Enlarge images: the published name of `ldm superres`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.superres import main

if __name__ == "__main__":
    sys.exit(main())
