"""Sample images from layouts of labelled boxes: the published name of `ldm layout2img`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.layout2img import main

if __name__ == "__main__":
    sys.exit(main())
