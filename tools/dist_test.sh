#!/usr/bin/env bash
# Evaluate with one process per GPU, or with N processes on the CPU where there is no GPU.
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT N [options of tools/test.py]" >&2
    exit 2
fi
exec "$(dirname "$0")/torchrun.sh" "$3" test.py "$1" "$2" "${@:4}"
