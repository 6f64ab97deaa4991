"""Draw pictures of classes.

python scripts/class2img.py --classes "red heart" fox
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.class2img import ClassToImage
from ldm.tasks.run import command_of

main = command_of(ClassToImage())

if __name__ == "__main__":
    sys.exit(main())
