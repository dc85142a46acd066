#!/usr/bin/env bash
# Train on several GPUs, or on CPU processes where there is no CUDA. PROCESSES are those of this
# machine. For several machines, run it on each of them with NNODES, NODE_RANK (0, 1, ...),
# MASTER_ADDR (address of machine 0) and PORT set in the environment.
source "$(dirname "$0")/launch.sh"
usage 2 $# 'CONFIG PROCESSES [options of tools/train.py]'
on_this_machine "$2" train.py "$1" "${@:3}"
