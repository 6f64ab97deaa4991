"""Prepare a folder of images for training: the script of `ldm prepare`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
