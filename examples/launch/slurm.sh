#!/usr/bin/env bash
# Any program on several nodes of a SLURM cluster; a run that was interrupted goes on when it is submitted again.
#   sbatch --nodes=4 examples/launch/slurm.sh spo train_data.path=... actor.model_name=... trainer.experiment_name=...
# Hardware: nodes of 8 GPUs (--gpus-per-node, --cpus-per-task below) that share the folder it is submitted from.
#SBATCH --job-name=rl2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -eu
cd "${SLURM_SUBMIT_DIR:?submit with sbatch}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun keeps the addresses of processes that died in its store, unless each start gets one of its own
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

program=$1
shift
srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc_per_node="${NPROC:-8}" \
  --max-restarts="${MAX_RESTARTS:-3}" \
  --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$first:${PORT:-29500}" \
  -m "RL2.trainer.$program" \
  trainer.load_ckpt_from=latest \
  "$@"
