#!/usr/bin/env bash
# DPO on the pairs of UltraFeedback, from a model that was fine-tuned on instructions.
# Hardware: written for one node of 4 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-4}" -m RL2.trainer.dpo \
  data.path=train@Chenmien/UltraFeedback \
  data.test_ratio=0.03 \
  data.max_length=1024 \
  actor.model_name=allenai/Llama-3.1-Tulu-3-8B-SFT \
  actor.max_length_per_device=4096 \
  actor.beta=0.1 \
  actor.scheduler=cosine \
  trainer.project=UltraFeedback \
  trainer.experiment_name=ultrafeedback_dpo \
  trainer.test_freq=50 \
  "$@"
