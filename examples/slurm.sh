#!/bin/bash
# Train on several nodes under Slurm, and go on after a preemption or the time limit:
#   sbatch examples/slurm.sh configs/xl2.yaml data.path=…
#
# Each node runs one torchrun, which starts a rank for each GPU. Slurm warns this script 5 minutes before the end and when the
# job is preempted; it passes SIGTERM on, every rank saves and exits, and the job goes back into the queue. The same command
# then finds the newest checkpoint in output_dir, which must lie on a disk that all nodes share.
#SBATCH --job-name=sitfast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#SBATCH --output=sitfast-%j.log

set -euo pipefail
config=${1:?the config file, then section.field=value …}
shift

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${head%%$'\n'*} # the first; `| head -n 1` can end the script, as scontrol may still be writing
export OMP_NUM_THREADS=8
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds between SIGTERM and SIGKILL in which ranks save (torch 2.13 knows it, 2.11 waits 30)

# One log a rank, also of the attempts before a restart; what rank 0 prints goes to the job's log as well.
torchrun=(
  torchrun
  --nnodes="$SLURM_JOB_NUM_NODES"
  --nproc-per-node="$SLURM_GPUS_ON_NODE"
  --rdzv-backend=c10d
  --rdzv-endpoint="$head:29500"
  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  --max-restarts=20
  --log-dir="logs/$SLURM_JOB_ID"
  --redirects=3
  --tee=0:3
)

# A look at the cluster first: GPUs, network, disk, memory. Its FAILs end the job before it costs anything.
srun --kill-on-bad-exit=1 "${torchrun[@]}" --max-restarts=0 -m sitfast.doctor --config "$config" "$@"

stopped= step=
trap 'stopped=1; if [[ $step ]]; then kill -TERM "$step"; fi' TERM # before there is anything to stop
srun --kill-on-bad-exit=1 "${torchrun[@]}" -m sitfast.train --config "$config" "$@" &
step=$!
if [[ $stopped ]]; then kill -TERM "$step"; fi
status=0
wait "$step" || status=$?
if [[ $stopped ]]; then
  wait "$step" || true # the first wait ended with the signal; now the ranks save
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
