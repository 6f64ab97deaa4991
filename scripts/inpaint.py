"""Fill the masked parts of pictures.

python scripts/inpaint.py --indir data/inpainting_examples --outdir outputs/inpainting_results
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a bare clone too

from ldm.tasks.inpainting import Inpainting
from ldm.tasks.run import command_of

main = command_of(Inpainting())

if __name__ == "__main__":
    sys.exit(main())
