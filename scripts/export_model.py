"""Export a training checkpoint as a model folder: the published name of `ldm export_model`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.export_model import main

if __name__ == "__main__":
    sys.exit(main())
