"""Encode and decode images with a first stage, and measure the loss: the published name of `ldm reconstruct`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.reconstruct import main

if __name__ == "__main__":
    sys.exit(main())
