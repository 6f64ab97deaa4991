"""Sample images of classes: the published name of `ldm class2img`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.class2img import main

if __name__ == "__main__":
    sys.exit(main())
