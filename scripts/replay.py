"""Sample images again from the settings in their files: the published name of `ldm replay`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.replay import main

if __name__ == "__main__":
    sys.exit(main())
