#!/usr/bin/env bash
# Train on a Slurm cluster. In the environment: GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5),
# SRUN_ARGS (further options of srun), PORT (default: one that follows from the number of the job).
# CPU_ONLY=1 asks for no GPUs: GPUS and GPUS_PER_NODE then are numbers of processes.
source "$(dirname "$0")/launch.sh"
usage 4 $# 'PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]'
on_slurm "$1" "$2" train.py "$3" --work-dir "$4" "${@:5}"
