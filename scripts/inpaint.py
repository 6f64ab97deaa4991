"""Fill the masked parts of images: the published name of `ldm inpaint`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.inpaint import main

if __name__ == "__main__":
    sys.exit(main())
