"""Reinforcement learning as one flat script, on the public functions of RL2: Dr. GRPO on the data of `rl2 demo`.

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
import asyncio
import time
from pathlib import Path

import torch

from RL2.batch.advantages import reinforce
from RL2.batch.packing import loss_weights, microbatches, pack
from RL2.data.cursor import Cursor
from RL2.data.prompts import load_prompts
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.models.policy import Policy, export, load_tokenizer, max_length, named_weights, stop_tokens
from RL2.objectives.policy_gradient import ppo
from RL2.parallel.fsdp import clip_grad_norm
from RL2.rollout.environment import load_environment
from RL2.rollout.episodes import EpisodeSetting
from RL2.types import Sampling, StatsRequest, TokenStats, Trajectory

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

    # the policy, and an engine that samples from its very tensors
    model_name = str(options.demo / "warm-up" / "latest")
    tokenizer = load_tokenizer(model_name)
    policy = Policy.load(model_name)
    longest = min(MAX_TOKENS + 1, max_length(model_name))
    engine = EmbeddedEngine(
        policy.lm, decode=tokenizer.decode, max_running_requests=256, memory_share=0.6, owns_weights=False
    )
    sampling = Sampling(MAX_NEW_TOKENS, temperature=1.0, stop_token_ids=stop_tokens(policy.lm, tokenizer))

    # the tasks: rows in a seeded order, and a script that scores responses
    environment = load_environment(options.env, 60)
    prompts = load_prompts(str(options.demo / "data" / "train.jsonl"), tokenizer, environment.example, longest - 1)
    setting = EpisodeSetting(engine, environment, tokenizer, max_turns=1, max_length=longest)
    cursor = Cursor(len(prompts), options.prompts, SEED)

    # AdamW, with weight decay on matrices only
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.999),
    )

    async def rollout(step: int) -> list[Trajectory]:
        """Play RESPONSES episodes of each prompt of a step, all at once; seed, step and place make random numbers."""
        tasks = []
        for group, row in enumerate(cursor.next()):
            seed = SEED * 1_000_000 + step
            tasks += setting.begin(prompts[row], sampling, number=RESPONSES, group=group, seed=seed)
        return await asyncio.gather(*tasks)

    with asyncio.Runner() as runner:
        for step in range(options.steps):
            begun = time.perf_counter()
            engine.load_weights(named_weights(policy.lm, torch.float32), version=step)
            trajectories = runner.run(rollout(step))
            engine.sleep()

            # one packed batch: advantages, and the weight of every token in the mean
            scored = [trajectory for trajectory in trajectories if trajectory.unscored is None]
            batch = pack(scored, step)
            batch = batch.with_(
                advantage_T=reinforce(batch, global_norm=False, norm_var=False, group_size=RESPONSES),
                weight_T=loss_weights(batch, train_on="all", level="token", average_over="all"),
            )

            # one update: gradients are summed over the microbatches
            policy.train()
            (mine,) = microbatches(batch, range(batch.num_sequences), MAX_TOKENS, num_ranks=1)
            for ids in mine:
                microbatch = batch.sequences(ids)
                stats = TokenStats(**policy(microbatch, microbatch.shared(), StatsRequest(("logp", "entropy"))))
                actions = microbatch.positions(microbatch.action_T)
                assert actions.weight_T is not None
                loss_T, _ = ppo(stats, actions)
                (loss_T * actions.weight_T).sum().backward()
            clip_grad_norm(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()

            reward = sum(trajectory.reward for trajectory in scored) / len(scored)
            print(f"step {step}: reward {reward:.3f}, {time.perf_counter() - begun:.1f} s", flush=True)

    environment.close()
    export(policy.lm, tokenizer, options.out / "latest", write=True)


if __name__ == "__main__":
    main()
