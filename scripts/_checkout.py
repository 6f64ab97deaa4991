"""Put the repository first on the import path, so that a script runs the code beside it, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
