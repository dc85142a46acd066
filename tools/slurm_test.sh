#!/usr/bin/env bash
# Test on a Slurm cluster.
#
#   bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
#
# The environment is that of tools/slurm_run.sh.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "error: usage: bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)

exec bash "$TOOLS/slurm_run.sh" "$1" "$2" "$TOOLS/test.py" "$3" "$4" "${@:5}"
