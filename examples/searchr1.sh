#!/usr/bin/env bash
# Search-R1 with Dr. GRPO: the model searches a corpus, as often as it likes within four turns, and answers questions.
# Start the retrieval service first: python envs/local_search_service.py --corpus corpus.jsonl --port 8000
# Any other service that speaks Search-R1's /retrieve is named with SEARCH_URL.
# Hardware: written for one node of 4 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-4}" -m RL2.trainer.ppo \
  train_data.path=train@Chenmien/SearchR1 \
  train_data.prompts_per_rollout=256 \
  train_data.responses_per_prompt=5 \
  test_data.path=test@Chenmien/SearchR1 \
  actor.model_name=Qwen/Qwen2.5-3B \
  actor.max_length_per_device=8192 \
  actor.avg_level=token \
  adv.estimator=reinforce \
  rollout.env_path=envs/searchr1.py \
  rollout.max_turns=4 \
  rollout.train_sampling_params.max_new_tokens=512 \
  "rollout.train_sampling_params.stop=['</search>','</answer>']" \
  trainer.project=SearchR1 \
  trainer.experiment_name=searchr1 \
  trainer.test_freq=8 \
  trainer.save_freq=32 \
  "$@"
