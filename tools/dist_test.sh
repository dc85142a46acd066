#!/usr/bin/env bash
# Test on several GPUs, or on CPU processes where there is no CUDA.
#
#   bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]
#
# PROCESSES are those of this machine. For several machines, run it on each of them with NNODES,
# NODE_RANK (0, 1, ...), MASTER_ADDR (address of machine 0) and PORT set in the environment.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "error: usage: bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
PROCESSES=$3
TOOLS=$(cd "$(dirname "$0")" && pwd)

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$TOOLS/dist_run.py" \
    "$PROCESSES" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
