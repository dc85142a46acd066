#!/usr/bin/env bash
# Test on a Slurm cluster; see tools/slurm_train.sh.
source "$(dirname "$0")/launch.sh"
usage 4 $# 'PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]'
on_slurm "$1" "$2" test.py "$3" "$4" "${@:5}"
