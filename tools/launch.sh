# What the launchers have in common; tools/dist_*.sh and tools/slurm_*.sh read it.
set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}"

fail() {
    echo "error: $1" >&2
    exit 2
}

usage() { # ARGUMENTS GIVEN TEXT
    [ "$2" -ge "$1" ] || fail "usage: bash $0 $3"
}

whole_number() { # NAME VALUE
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1='$2' must be a whole number from 1 on"
}

on_this_machine() { # PROCESSES TOOL ARGUMENTS
    whole_number PROCESSES "$1"
    whole_number NNODES "${NNODES:=1}"
    if [ "$NNODES" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        fail "NNODES=$NNODES needs MASTER_ADDR, the address of machine 0"
    fi
    [[ ${NODE_RANK:=0} =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
        fail "NODE_RANK='$NODE_RANK' must be a whole number below NNODES=$NNODES"
    exec "${PYTHON:-python}" -m torch.distributed.run --nproc-per-node="$1" --nnodes="$NNODES" \
        --node-rank="$NODE_RANK" --master-addr="${MASTER_ADDR:-127.0.0.1}" \
        --master-port="${PORT:-29500}" "$TOOLS/$2" "${@:3}" --launcher pytorch
}

on_slurm() { # PARTITION JOB_NAME TOOL ARGUMENTS
    whole_number GPUS "${GPUS:=8}"
    whole_number GPUS_PER_NODE "${GPUS_PER_NODE:=8}"
    command -v srun >/dev/null ||
        fail 'there is no srun on this machine; run this on a login node of the cluster'
    local per_node=$((GPUS < GPUS_PER_NODE ? GPUS : GPUS_PER_NODE))
    local gres=(--gres="gpu:$per_node")
    [ "${CPU_ONLY:-0}" != 1 ] || gres=()
    [ -z "${PORT:-}" ] || export MASTER_PORT=$PORT
    # SRUN_ARGS is split into words on purpose.
    # shellcheck disable=SC2086
    exec srun -p "$1" --job-name="$2" ${gres[@]+"${gres[@]}"} --ntasks="$GPUS" \
        --ntasks-per-node="$per_node" --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "${PYTHON:-python}" -u "$TOOLS/$3" "${@:4}" --launcher slurm
}
