"""Build the search index of a retrieval database: the published name of `ldm train_searcher`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.train_searcher import main

if __name__ == "__main__":
    sys.exit(main())
