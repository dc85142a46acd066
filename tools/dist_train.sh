#!/usr/bin/env bash
# Train on several GPUs, or on CPU processes where there is no CUDA.
#
#   bash tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]
#
# PROCESSES are those of this machine. For several machines, run it on each of them with NNODES,
# NODE_RANK (0, 1, ...), MASTER_ADDR (address of machine 0) and PORT set in the environment.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "error: usage: bash tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]" >&2
    exit 2
fi
CONFIG=$1
PROCESSES=$2
TOOLS=$(cd "$(dirname "$0")" && pwd)

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$TOOLS/dist_run.py" \
    "$PROCESSES" "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
