#!/usr/bin/env bash
# Tasks of Reasoning Gym with Dr. GRPO; no data set: tasks are generated when they are needed.
# Needs: pip install 'rl2-spo[reasoning-gym]'. REASONING_GYM names another of its data sets.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."
export REASONING_GYM="${REASONING_GYM:-chain_sum}"

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.ppo \
  train_data.prompts_per_rollout=128 \
  train_data.responses_per_prompt=8 \
  test_data.prompts_per_rollout=256 \
  actor.model_name=Qwen/Qwen3-1.7B \
  actor.max_length_per_device=8192 \
  actor.avg_level=token \
  adv.estimator=reinforce \
  rollout.env_path=envs/reasoning_gym.py \
  rollout.train_sampling_params.max_new_tokens=2048 \
  rollout.dynamic_filtering=true \
  rollout.dynamic_filtering_rounds=3 \
  trainer.project=ReasoningGym \
  trainer.experiment_name=reasoning_gym \
  trainer.max_steps=300 \
  trainer.test_freq=10 \
  trainer.save_freq=50 \
  "$@"
