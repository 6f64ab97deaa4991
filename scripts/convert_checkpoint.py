"""Convert a checkpoint to safetensors, or back: the published name of `ldm convert_checkpoint`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
