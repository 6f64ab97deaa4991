"""Sample images from text: the published name of `ldm txt2img`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.txt2img import main

if __name__ == "__main__":
    sys.exit(main())
