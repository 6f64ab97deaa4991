"""Sample many images, to measure a model: the published name of `ldm sample_diffusion`."""

import sys

import _checkout  # noqa: F401 (imports the code beside this script)

from ldm.cli.sample_diffusion import main

if __name__ == "__main__":
    sys.exit(main())
