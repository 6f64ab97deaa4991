#!/usr/bin/env bash
# Download the nine published autoencoders. Options: ldm download_weights --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/scripts/download_weights.py" first-stages "$@"
