"""Draw pictures from pictures and text.

python scripts/img2img.py --image data/img2img_examples/rocket.png --prompt "rocket on a blue background" --strength 0.2
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.img2img import ImageToImage
from ldm.tasks.run import command_of

main = command_of(ImageToImage())

if __name__ == "__main__":
    sys.exit(main())
