"""Download published weights: the published name of `ldm download_weights`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.download_weights import main

if __name__ == "__main__":
    sys.exit(main())
