#!/usr/bin/env bash
# Warm-up: supervised fine-tuning on the solutions of GSM8K, in the format that the rollouts are graded in.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.sft \
  data.path=train@openai/gsm8k:main \
  data.env_path=envs/gsm8k.py \
  data.max_length=1024 \
  data.batch_size=128 \
  actor.model_name=Qwen/Qwen3-4B-Thinking-2507 \
  actor.max_length_per_device=8576 \
  actor.lr=1e-5 \
  trainer.project=GSM8K \
  trainer.experiment_name=gsm8k_sft \
  trainer.n_epochs=1 \
  "$@"
