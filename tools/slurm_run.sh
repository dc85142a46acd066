#!/usr/bin/env bash
# Run a tool on a Slurm cluster; tools/slurm_train.sh and tools/slurm_test.sh call it.
#
#   bash tools/slurm_run.sh PARTITION JOB_NAME SCRIPT [arguments of the script]
#
# In the environment: GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS (further options
# of srun), PORT (default: one that follows from the number of the job). CPU_ONLY=1 asks for no
# GPUs: GPUS and GPUS_PER_NODE then are numbers of processes.
set -euo pipefail

PARTITION=$1
JOB_NAME=$2
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
for name in GPUS GPUS_PER_NODE; do
    if ! [[ ${!name} =~ ^[1-9][0-9]*$ ]]; then
        echo "error: $name='${!name}' must be a whole number from 1 on" >&2
        exit 2
    fi
done
if [ "$GPUS" -lt "$GPUS_PER_NODE" ]; then
    GPUS_PER_NODE=$GPUS
fi
if ! command -v srun >/dev/null; then
    echo 'error: there is no srun on this machine; run this on a login node of the cluster' >&2
    exit 2
fi
GRES=(--gres="gpu:$GPUS_PER_NODE")
if [ "${CPU_ONLY:-0}" = 1 ]; then
    GRES=()
fi
if [ -n "${PORT:-}" ]; then
    export MASTER_PORT=$PORT
fi
TOOLS=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"

# SRUN_ARGS is split into words on purpose.
# shellcheck disable=SC2086
exec srun -p "$PARTITION" \
    --job-name="$JOB_NAME" \
    ${GRES[@]+"${GRES[@]}"} \
    --ntasks="$GPUS" \
    --ntasks-per-node="$GPUS_PER_NODE" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "${@:3}" --launcher slurm
