"""Draw pictures from layouts of labelled boxes.

python scripts/layout2img.py --layout data/layout_examples --labels class-descriptions-boxable.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.layout2img import LayoutToImage
from ldm.tasks.run import command_of

main = command_of(LayoutToImage())

if __name__ == "__main__":
    sys.exit(main())
