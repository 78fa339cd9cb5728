#!/usr/bin/env bash
# A reward model from the pairs of Skywork-Reward, tested on 3% of them that it is not trained on.
# Hardware: written for one node of 4 GPUs with 80 GB each; NPROC=n takes n of them. Time and score: not measured.
set -eu
cd "$(dirname "$0")/.."

torchrun --nproc_per_node="${NPROC:-4}" -m RL2.trainer.rm \
  data.path=train@Chenmien/SkyworkRM \
  data.test_ratio=0.03 \
  data.max_length=2048 \
  critic.model_name=meta-llama/Llama-3.1-8B-Instruct \
  critic.max_length_per_device=8192 \
  critic.lr=2e-6 \
  trainer.project=SkyworkRM \
  trainer.experiment_name=skywork_rm \
  trainer.test_freq=50 \
  "$@"
