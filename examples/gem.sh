#!/usr/bin/env bash
# Games of GEM over several turns with advantages normalised over the rollout; no data set: games are generated when they are needed.
# Needs: pip install 'rl2-spo[gem]' && pip install --no-deps gem-llm. GEM_ENV names another game.
# Hardware: written for one node of 8 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."
export GEM_ENV="${GEM_ENV:-game:GuessTheNumber-v0-hard}"

torchrun --nproc_per_node="${NPROC:-8}" -m RL2.trainer.ppo \
  train_data.prompts_per_rollout=512 \
  train_data.responses_per_prompt=1 \
  test_data.prompts_per_rollout=256 \
  actor.model_name=Qwen/Qwen3-4B-Base \
  actor.max_length_per_device=16384 \
  actor.avg_level=sequence \
  adv.estimator=reinforce \
  adv.global_norm=true \
  adv.norm_var=true \
  rollout.env_path=envs/gem.py \
  rollout.max_turns=16 \
  rollout.train_sampling_params.max_new_tokens=4096 \
  trainer.project=GEM \
  trainer.experiment_name=gem \
  trainer.max_steps=500 \
  trainer.test_freq=10 \
  trainer.save_freq=50 \
  "$@"
