"""Sample images with a retrieval-augmented model: the published name of `ldm knn2img`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.knn2img import main

if __name__ == "__main__":
    sys.exit(main())
