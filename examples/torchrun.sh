#!/bin/bash
# The plain torchrun lines, without a scheduler. Start the one that fits by hand, or copy it.
#
#   examples/torchrun.sh one …                  all GPUs of this host
#   examples/torchrun.sh node HOST NODES …      on each of NODES hosts, the master too; HOST is where they meet
#   examples/torchrun.sh elastic HOST MIN:MAX … the same with any number of hosts between MIN and MAX, at any time
#
# The rest of the line goes to sitfast.train: --config configs/xl2.yaml data.path=/data/imagenet/train …
set -euo pipefail
how=${1:-}
shift || true
case $how in
one)
  exec torchrun --standalone --nproc-per-node=gpu --max-restarts=20 -m sitfast.train "$@"
  ;;
node | elastic)
  # There is no line of its own for the master: the host that HOST names becomes it. The id tells one job from another.
  host=${1:?the host where they meet}
  nodes=${2:?how many hosts, or MIN:MAX}
  shift 2
  exec torchrun --nnodes="$nodes" --nproc-per-node=gpu --rdzv-backend=c10d --rdzv-endpoint="$host:29500" \
    --rdzv-id=sitfast --max-restarts=20 -m sitfast.train "$@"
  ;;
*)
  sed -n 's/^# \{0,3\}//p' "$0" | tail -n +2
  exit 2
  ;;
esac
