#!/usr/bin/env bash
# Open-Reasoner-Zero's mathematics with PPO: a critic, no discount, no KL. Needs: pip install 'rl2-spo[math]'.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.ppo \
  train_data.path=train@Chenmien/OpenReasonerZero \
  train_data.prompts_per_rollout=128 \
  train_data.responses_per_prompt=64 \
  test_data.path=train@Chenmien/OlympiadBench \
  actor.model_name=Qwen/Qwen2.5-7B \
  actor.max_length_per_device=8576 \
  actor.avg_level=token \
  actor.freeze_steps=4 \
  critic.update_per_rollout=12 \
  adv.estimator=gae \
  adv.gamma=1.0 \
  adv.lamda=1.0 \
  adv.global_norm=true \
  adv.norm_var=true \
  rollout.env_path=envs/orz.py \
  rollout.max_turns=1 \
  rollout.train_sampling_params.max_new_tokens=8192 \
  "rollout.train_sampling_params.stop=['</answer>']" \
  trainer.project=OpenReasonerZero \
  trainer.experiment_name=orz_ppo \
  trainer.test_freq=8 \
  trainer.save_freq=32 \
  trainer.keep=2 \
  "$@"
