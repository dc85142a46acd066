#!/usr/bin/env bash
# Test on several GPUs, or on CPU processes where there is no CUDA; see tools/dist_train.sh.
source "$(dirname "$0")/launch.sh"
usage 3 $# 'CONFIG CHECKPOINT PROCESSES [options of tools/test.py]'
on_this_machine "$3" test.py "$1" "$2" "${@:4}"
