"""Draw pictures from text.

python scripts/txt2img.py --prompt "rocket on a blue background"
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.run import command_of
from ldm.tasks.text2img import TextToImage

main = command_of(TextToImage())

if __name__ == "__main__":
    sys.exit(main())
