"""Reinforcement learning as one flat script, on the Python API: Dr. GRPO on the data of `rl2 demo`.

    python examples/rl_loop.py runs/demo OUT --steps 20

It ends with the weights of this command, to the last bit (tests/integration/test_rl_loop.py):

    rl2 train ppo train_data.path=runs/demo/data/train.jsonl train_data.prompts_per_rollout=64 \\
      train_data.responses_per_prompt=4 actor.model_name=runs/demo/warm-up/latest actor.max_length_per_device=32768 \\
      actor.lr=1e-4 actor.tis_coef=0 rollout.train_sampling_params.max_new_tokens=36 rollout.env_path=envs/gsm8k.py \\
      trainer.max_steps=20 trainer.experiment_name=loop trainer.save_dir=OUT

Left out, because the programs have it: configuration and its checks; processes, FSDP, tensor and sequence parallelism;
served engines, rollouts ahead of training, several updates a rollout; tests, metrics, warnings, checkpoints, resuming;
KL divergence, entropy, importance weights, token selection, schedules, LoRA, critics.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from RL2 import api
from RL2.data.cursor import Cursor

ENVIRONMENT = Path(__file__).resolve().parents[1] / "envs" / "gsm8k.py"
PROMPTS, RESPONSES, MAX_NEW_TOKENS = 64, 4, 36
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 0.01, 1.0
MAX_TOKENS = 32_768
"""Tokens of one microbatch."""
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of rl2 demo")
    parser.add_argument("out", type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="prompts of a step")
    parser.add_argument("--env", type=Path, default=ENVIRONMENT, help="script of the environment")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # as the programs do: denormals are slow on CPUs and train nothing

    policy, tokenizer = api.load(options.demo / "warm-up" / "latest")
    optimizer = api.adamw(policy.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    # the tasks: rows in a seeded order, and a script that scores responses
    with (options.demo / "data" / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    cursor = Cursor(len(rows), options.prompts, SEED)
    environment = api.load_environment(options.env)

    for step in range(options.steps):
        begun = time.perf_counter()
        trajectories = api.sample(
            policy,
            tokenizer,
            [rows[row] for row in cursor.next()],
            num_samples=RESPONSES,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=SEED * 1_000_000 + step,
            environment=environment,
        )

        # one packed batch: advantages, and the weight of every token in the mean
        scored = [trajectory for trajectory in trajectories if trajectory.unscored is None]
        batch = api.pack(scored)
        batch = batch.with_(
            advantage_T=api.advantages(batch, "reinforce", group_size=RESPONSES),
            weight_T=api.loss_weights(batch, train_on="all", level="token", average_over="all"),
        )

        # one update: gradients are summed over the microbatches
        metrics = api.forward_backward(policy, batch, "ppo", max_tokens=MAX_TOKENS)
        grad_norm = api.optimizer_step(policy, optimizer, max_grad_norm=MAX_GRAD_NORM)

        reward = sum(trajectory.reward for trajectory in scored) / len(scored)
        means = f"reward {reward:.3f}, entropy {metrics['entropy']:.3f}, gradient {grad_norm:.3f}"
        print(f"step {step}: {means}, {time.perf_counter() - begun:.1f} s", flush=True)

    environment.close()
    api.save(policy, tokenizer, options.out / "latest")


if __name__ == "__main__":
    main()
