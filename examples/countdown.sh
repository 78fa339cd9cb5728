#!/usr/bin/env bash
# Countdown with Dr. GRPO: an expression that makes the target out of the numbers, each used exactly once.
# Hardware: written for one node of 4 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-4}" -m RL2.trainer.ppo \
  train_data.path=train@Chenmien/Countdown \
  train_data.prompts_per_rollout=128 \
  train_data.responses_per_prompt=4 \
  test_data.path=test@Chenmien/Countdown \
  actor.model_name=Qwen/Qwen2.5-3B-Instruct \
  actor.max_length_per_device=8192 \
  actor.avg_level=token \
  adv.estimator=reinforce \
  rollout.env_path=envs/countdown.py \
  rollout.train_sampling_params.max_new_tokens=1024 \
  "rollout.train_sampling_params.stop=['</answer>']" \
  trainer.project=Countdown \
  trainer.experiment_name=countdown \
  trainer.test_freq=8 \
  trainer.save_freq=32 \
  "$@"
