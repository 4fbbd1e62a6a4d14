#!/usr/bin/env bash
# What a session with a GPU should run, in eight minutes and with nothing to install; see benchmarks/README.md.
#
#   benchmarks/gpu.sh                          everything, into replfx-benchmarks/gpu (or $OUT)
#   benchmarks/gpu.sh --device cpu --quick     does it run at all?
#   PYTHON=.venv/bin/python benchmarks/gpu.sh --parts language,tests
set -eu
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks gpu --out "${OUT:-replfx-benchmarks/gpu}" "$@"
