#!/usr/bin/env bash
# Times `hf2onnx build` against cp, and against other exporters where they are installed (benches/requirements.txt).
#   benches/build.sh [--scratch DIR] [--rounds N] [--rows NAME,...] [--peers PYTHON] [--disk GB] [--json FILE]
# Checkpoints are made in the scratch folder and reused when they are there: 2.5 GB for the 1B, 16 GB for the 8B.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
cargo build --release --manifest-path "$root/Cargo.toml"
exec python3 "$root/benches/build.py" "$@"
