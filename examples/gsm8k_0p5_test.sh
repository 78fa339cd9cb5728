#!/usr/bin/env bash
# Try that everything works: four small steps of gsm8k_0p5_0.sh on short responses, without a test set.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.spo_0p5 \
  train_data.path=train@openai/gsm8k:main \
  train_data.prompts_per_rollout=32 \
  train_data.responses_per_prompt=1 \
  actor.model_name=Qwen/Qwen3-4B-Thinking-2507 \
  actor.max_length_per_device=2432 \
  actor.entropy.coef=0.0 \
  rollout.env_path=envs/gsm8k.py \
  rollout.train_sampling_params.temperature=1.0 \
  rollout.train_sampling_params.max_new_tokens=2048 \
  trainer.project=GSM8K \
  trainer.experiment_name=gsm8k_0p5_test \
  trainer.max_steps=4 \
  "$@"
