"""Sample images from label maps: the published name of `ldm semantic2img`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.semantic2img import main

if __name__ == "__main__":
    sys.exit(main())
