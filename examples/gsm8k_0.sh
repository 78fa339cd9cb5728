#!/usr/bin/env bash
# SPO towards the most likely token (section 3.1), divided by all sequences of the step; no entropy term.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.spo \
  train_data.path=train@openai/gsm8k:main \
  train_data.prompts_per_rollout=512 \
  train_data.responses_per_prompt=1 \
  test_data.path=test@openai/gsm8k:main \
  actor.model_name=Qwen/Qwen3-4B-Thinking-2507 \
  actor.max_length_per_device=8576 \
  actor.average_over=all \
  actor.entropy.coef=0.0 \
  rollout.env_path=envs/gsm8k.py \
  rollout.train_sampling_params.temperature=1.0 \
  rollout.train_sampling_params.max_new_tokens=8192 \
  rollout.test_sampling_params.temperature=0.0 \
  trainer.project=GSM8K \
  trainer.experiment_name=gsm8k_0 \
  trainer.n_epochs=150 \
  trainer.test_freq=5 \
  trainer.save_freq=20 \
  "$@"
