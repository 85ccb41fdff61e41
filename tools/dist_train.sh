#!/usr/bin/env bash
# Train with one process per GPU, or with N processes on the CPU where there is no GPU.
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG N [options of tools/train.py]" >&2
    exit 2
fi
exec "$(dirname "$0")/torchrun.sh" "$2" train.py "$1" "${@:3}"
