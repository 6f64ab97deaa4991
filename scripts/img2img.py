"""Sample images from images and text: the published name of `ldm img2img`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.img2img import main

if __name__ == "__main__":
    sys.exit(main())
