"""Enlarge pictures.

python scripts/superres.py --indir data/superres_examples
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.run import command_of
from ldm.tasks.superresolution import SuperResolution

main = command_of(SuperResolution())

if __name__ == "__main__":
    sys.exit(main())
