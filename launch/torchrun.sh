#!/usr/bin/env bash
# Training under torchrun, on one machine or several; the same command on each of them.
#
# One machine, a process for every GPU (without GPUs: NPROC_PER_NODE=2):
#   launch/torchrun.sh RECIPE key=value
# Two machines, static: every machine has its number, 0 is the one whose address is given
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh RECIPE key=value
# Two machines, elastic: no numbers. A process or machine that is lost, and all others with it, go on from the last
# checkpoint, MAX_RESTARTS times; with NNODES=1:2 they do so without the lost machine, too
#   NNODES=1:2 MAX_RESTARTS=3 RDZV_ENDPOINT=10.0.0.1:29500 launch/torchrun.sh RECIPE key=value
# ZeRO:
#   DEEPSPEED_CONFIG=launch/deepspeed/zero1.json launch/torchrun.sh RECIPE key=value
#
# The run's folder has to be on a file system that all machines see. docs/many_machines.md says more.
set -euo pipefail

# machines; LEAST:MOST where fewer will do, which needs RDZV_ENDPOINT
NNODES=${NNODES:-1}
# processes on each machine: a number, gpu, or auto
NPROC_PER_NODE=${NPROC_PER_NODE:-auto}
# how often all processes are started again before the launch ends with an error
MAX_RESTARTS=${MAX_RESTARTS:-0}
# static: this machine's number, and the address and port of machine 0
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
# elastic: HOST:PORT of the machine that keeps the list of those who are there; the run lives as long as that one
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}
# the same for all machines of one run, different for two runs
RDZV_ID=${RDZV_ID:-psn_train}
# seconds: between signs of life, three of which may be missed; to wait for machines; to wait for more than the least
RDZV_CONF=${RDZV_CONF:-keep_alive_interval=5,keep_alive_max_attempt=3,join_timeout=600,last_call_timeout=30}
# elastic: this machine's own address, where the others cannot resolve its host name
LOCAL_ADDR=${LOCAL_ADDR:-}
# a file of launch/deepspeed, for ZeRO
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-}
PYTHON=${PYTHON:-python}

if [ $# -eq 0 ]; then
  echo "launch/torchrun.sh: which recipe? launch/torchrun.sh RECIPE key=value" >&2
  exit 2
fi
flags=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS")
if [ "$NNODES" = 1 ] && [ -z "$RDZV_ENDPOINT" ]; then
  # takes a free port
  flags+=(--standalone --local-addr 127.0.0.1)
elif [ -n "$RDZV_ENDPOINT" ]; then
  flags+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID" --rdzv-conf "$RDZV_CONF")
  [ -z "$LOCAL_ADDR" ] || flags+=(--local-addr "$LOCAL_ADDR")
elif [ "$MAX_RESTARTS" != 0 ]; then
  echo "launch/torchrun.sh: on several machines restarts need RDZV_ENDPOINT=HOST:PORT" >&2
  exit 2
else
  flags+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
# else the processes of a restart find the addresses of those before them, and call the dead (seen with torch 2.15)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ -n "$DEEPSPEED_CONFIG" ]; then
  export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=$DEEPSPEED_CONFIG
fi
exec "$PYTHON" -m torch.distributed.run "${flags[@]}" -m psn_train.train "$@"
