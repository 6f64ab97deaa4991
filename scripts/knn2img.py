"""Draw pictures from text and pictures near it, with a retrieval-augmented model.

python scripts/knn2img.py --prompt "a happy bear reading a newspaper, oil on canvas" --use_neighbors
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.knn2img import RetrievalToImage
from ldm.tasks.run import command_of

main = command_of(RetrievalToImage())

if __name__ == "__main__":
    sys.exit(main())
