#!/usr/bin/env bash
# Download every diffusion model whose configuration is in models/ldm. Options: ldm download_weights --help
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$root/scripts/download_weights.py" models "$@"
