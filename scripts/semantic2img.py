"""Draw pictures from maps of labels.

python scripts/semantic2img.py --map data/semantic_examples/lake.png
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.run import command_of
from ldm.tasks.semantic2img import SemanticToImage

main = command_of(SemanticToImage())

if __name__ == "__main__":
    sys.exit(main())
