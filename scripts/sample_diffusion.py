"""Draw many samples of a model, as files and as one array for tools that measure them.

python scripts/sample_diffusion.py -r models/ldm/celeba256 -n 50000 --batch_size 10 -c 200
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.cli.command import command
from ldm.tasks.bulk import run
from ldm.tasks.sample_diffusion import SampleDiffusion


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    run(SampleDiffusion(), argv)


if __name__ == "__main__":
    sys.exit(main())
