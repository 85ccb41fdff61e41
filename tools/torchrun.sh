#!/usr/bin/env bash
# N processes of a tool over torchrun; dist_train.sh and dist_test.sh call this.
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
processes=$1 tool=$2
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the number of processes must be a whole number from 1, not '$processes'" >&2
    exit 2
fi
if [ "${NNODES:-1}" = 1 ]; then
    where=(--standalone)  # picks a free port
else
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
        --master-port "${PORT:-29500}")
fi
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" \
    "$tools/$tool" "${@:3}" --launcher pytorch
