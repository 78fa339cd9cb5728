#!/usr/bin/env bash
# GSM8K with a calculator in the loop and Dr. GRPO: each <calc> is answered before the response goes on.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.ppo \
  train_data.path=train@openai/gsm8k:main \
  train_data.prompts_per_rollout=128 \
  train_data.responses_per_prompt=4 \
  test_data.path=test@openai/gsm8k:main \
  actor.model_name=Qwen/Qwen3-0.6B \
  actor.max_length_per_device=8192 \
  actor.avg_level=token \
  adv.estimator=reinforce \
  rollout.env_path=envs/calculator.py \
  rollout.max_turns=8 \
  rollout.train_sampling_params.max_new_tokens=1024 \
  "rollout.train_sampling_params.stop=['</calc>']" \
  trainer.project=GSM8K \
  trainer.experiment_name=calculator \
  trainer.test_freq=5 \
  trainer.save_freq=20 \
  "$@"
