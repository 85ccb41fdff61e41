#!/usr/bin/env bash
# Train on a Slurm cluster, one task per GPU.
# GPUS (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS are read from the environment.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of tools/train.py]" >&2
    exit 2
fi
exec "$(dirname "$0")/srun.sh" "$1" "$2" train.py "$3" --work-dir "$4" "${@:5}"
