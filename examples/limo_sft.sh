#!/usr/bin/env bash
# LIMO: supervised fine-tuning on few, long, careful solutions of mathematics.
# Hardware: written for one node of 4 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-4}" -m RL2.trainer.sft \
  data.path=train@Chenmien/LIMO \
  data.max_length=16384 \
  data.batch_size=32 \
  actor.model_name=Qwen/Qwen2.5-7B-Instruct \
  actor.sp_size=1 \
  actor.max_length_per_device=16384 \
  actor.lr=5e-6 \
  trainer.project=LIMO \
  trainer.experiment_name=limo_sft \
  trainer.n_epochs=15 \
  "$@"
