"""One step of reinforcement learning (rollout, rewards, update) in RL2 and in TRL's GRPOTrainer.

    make setup
    python benchmarks/rl_step.py [--steps 5] [--json FILE]

Both sides train the same random Qwen3 of 3.3 million parameters in float32 with Dr. GRPO: 32 prompts of 20 to 60
tokens, 4 responses each, one optimizer step on all 128. Two cases:

    ragged   a response ends with probability 1/60 per token, at most 512 tokens
    fixed    every response has 128 tokens

Each side is a separate process, so that its peak memory is its own. Sides alternate step by step and times are medians,
so that load affects both alike. On a shared machine set OMP_WAIT_POLICY=PASSIVE (threads that spin while they wait are
far slower there); processor seconds are then more informative than seconds. `memory` is the peak that steps add to the
process: weights and libraries are loaded before; gradients, optimizer state, cache and activations come with the steps.

TRL has its fastest settings for this case: no gradient checkpointing, no reference model, no logging or saving,
generation by transformers with a cache, and one batch of 128 (--peer-batch). RL2's microbatches are bounded in tokens
(--max-length), as its programs always are. The losses are equal up to a constant factor: TRL divides by the limit of
tokens, RL2 by their number.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from turns import Side, Steps, Turns, alternate, parser, ratios, table

NUM_PROMPTS, RESPONSES = 32, 4
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Case:
    name: str
    end_probability: float
    """Probability of the end token at every position."""
    max_new_tokens: int


CASES = (Case("ragged", 1 / 60, 512), Case("fixed", 0.0, 128))

ENVIRONMENT = """\
import zlib


async def step(state, action, extra_info):
    reward = float(zlib.crc32(action.encode()) & 1)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
"""


# The task: a folder with a model, its tokenizer, prompts and the environment.


Write = Callable[[Path, float, int, int], None]
"""Function that writes a model: (folder, probability of the end token, end token, padding token)."""


def write_task(folder: Path, case: Case, write: Write) -> None:
    from RL2.tools.reproduce.model import build_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(300)]
    tokenizer = build_tokenizer(" ".join(rng.choices(words, k=40)) for _ in range(300))
    tokenizer.save_pretrained(folder)
    prompts = []
    for number in range(NUM_PROMPTS):
        text = rng.choice(words)
        while len(tokenizer.encode(text)) < 20 + 40 * number / NUM_PROMPTS:
            text += " " + rng.choice(words)
        prompts.append(text)
    rng.shuffle(prompts)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    (folder / "environment.py").write_text(ENVIRONMENT)
    write(folder, case.end_probability, tokenizer.eos_token_id, tokenizer.pad_token_id)


def write_model(folder: Path, end_probability: float, end: int, pad: int) -> None:
    """Write a random model that samples `end` with about `end_probability` at every position.

    Feature 0 of the residual stream is a constant: embeddings set it and no layer writes to it. The head uses it only
    for the end token, like a bias.
    """
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=736,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        head = model.lm_head.weight
        head[:, 0] = 0
        head[end] = 0
        hidden_BLD = model.model(torch.randint(512, (16, 64))).last_hidden_state
        others_BLV = (hidden_BLD @ head.T).index_fill(-1, torch.tensor([end]), -math.inf)
        odds = end_probability / (1 - end_probability)
        logit = float(others_BLV.logsumexp(-1).mean()) + math.log(odds) if odds else -100.0
        head[end, 0] = logit / float(hidden_BLD[..., 0].mean())
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)


# A side: a process that makes one step on request.


def answer(turns: Turns, rollout_s: float, **values: float) -> None:
    update_s = time.perf_counter() - turns.begun - rollout_s
    turns.answer(rollout_s=rollout_s, update_s=update_s, **values)


def ours(folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    """Run the loop of RL2.trainer.rl.train, without its report."""
    from RL2.batch.packing import pack
    from RL2.config.load import load
    from RL2.config.programs import RLConfig
    from RL2.data.prompts import load_prompts
    from RL2.engines.make import make_engine
    from RL2.models.policy import end_tokens, load_tokenizer
    from RL2.parallel.processes import Processes
    from RL2.rollout.environment import load_environment
    from RL2.rollout.episodes import Episodes, EpisodeSetting
    from RL2.rollout.filters import trainable, with_signal
    from RL2.rollout.metrics import rollout_metrics
    from RL2.trainer.annotate import annotate
    from RL2.workers.actor import Actor

    config = load(
        "ppo",
        [
            f"train_data.path={folder}/prompts.jsonl",
            f"train_data.prompts_per_rollout={NUM_PROMPTS}",
            f"train_data.responses_per_prompt={RESPONSES}",
            f"actor.model_name={folder}",
            f"actor.max_length_per_device={options.max_length}",
            "actor.gradient_checkpointing=false",
            f"actor.lr={LEARNING_RATE}",
            "actor.warmup_ratio=0",
            "actor.weight_decay=0",
            "actor.tis_coef=0",
            f"rollout.train_sampling_params.max_new_tokens={options.max_new_tokens}",
            f"rollout.env_path={folder}/environment.py",
            "trainer.experiment_name=benchmark",
            f"trainer.save_dir={folder}",
        ],
    )
    assert isinstance(config, RLConfig)
    processes = Processes.start(config.trainer.timeout_s)
    tokenizer = load_tokenizer(config.actor.model_name)
    environment = load_environment(str(config.rollout.env_path), config.rollout.env_timeout_s)
    prompts = load_prompts(str(config.train_data.path), tokenizer, environment.example, options.max_length)
    actor = Actor(config.actor, processes, 1000, folder)
    engine = make_engine(config.rollout, actor, lambda ids: str(tokenizer.decode(ids)), options.max_length + 1, folder)
    setting = EpisodeSetting(engine, environment, tokenizer, config.rollout.max_turns, options.max_length + 1)
    episodes = Episodes(setting, end_tokens(actor.lm, tokenizer), processes)
    step = 0
    while turns.wait():
        engine.load_weights(actor.weights(), version=step)
        trajectories = episodes.play(prompts, config.rollout.train_sampling_params, RESPONSES, step, lambda done: None)
        metrics = rollout_metrics(trajectories, "train")
        rollout_s = time.perf_counter() - turns.begun
        trained = trainable(trajectories, with_signal(trajectories, config), config)
        batch = annotate(pack(trained), trained, config=config, actor=actor, reference=None)
        metrics |= actor.update(batch)
        answer(turns, rollout_s, tokens=metrics["actor/tokens"], reward=metrics["train/reward"])
        step += 1
    engine.close()
    environment.close()
    processes.stop()


def theirs(folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    """Run TRL's GRPOTrainer, with a callback that waits between steps and a clock around its rollout."""
    import zlib

    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clocked(GRPOTrainer):
        rollout_s, tokens, mean_reward = 0.0, 0, 0.0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            begun = time.perf_counter()
            outputs = super()._generate_and_score_completions(inputs)
            self.rollout_s = time.perf_counter() - begun
            self.tokens = int(outputs["completion_mask"].sum())
            return outputs

    class Gate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                turns.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            answer(turns, trainer.rollout_s, tokens=trainer.tokens, reward=trainer.mean_reward)
            control.should_training_stop = not turns.wait()

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        rewards = [float(zlib.crc32(text.encode()) & 1) for text in completions]
        trainer.mean_reward = fmean(rewards)
        return [*rewards]

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    batch = options.peer_batch
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=NUM_PROMPTS * RESPONSES // batch,
        num_generations=RESPONSES,
        max_completion_length=options.max_new_tokens,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        num_iterations=1,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        max_steps=1000,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    trainer = Clocked(
        model=str(folder),
        reward_funcs=reward,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows * 1000),  # so that no epoch ends within the benchmark
        callbacks=[Gate()],
    )
    trainer.train()


SIDES: dict[str, Callable[[Path, argparse.Namespace, Turns], None]] = {"ours": ours, "theirs": theirs}


# The parent lets the sides alternate and compares them.


ROWS = (
    ("step, s", "step_s", "speedup", "{:.2f}"),
    ("  rollout, s", "rollout_s", "rollout_speedup", "{:.2f}"),
    ("  update, s", "update_s", "update_speedup", "{:.2f}"),
    ("processor, s", "cpu_s", "cpu_speedup", "{:.2f}"),
    ("memory of the steps, MB", "memory_mb", "memory_ratio", "{:.0f}"),
    ("peak of the process, MB", "peak_mb", "peak_ratio", "{:.0f}"),
    ("tokens sampled a step", "tokens", "tokens_ratio", "{:.0f}"),
    ("mean reward", "reward", "reward_ratio", "{:.2f}"),
)


def measure(case: Case, options: argparse.Namespace, write: Write = write_model) -> Steps:
    """Return the steps of both sides, after a warm-up of one step each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, case, write)
        arguments = ["--folder", name, "--threads", str(options.threads), "--max-length", str(options.max_length)]
        arguments += ["--max-new-tokens", str(case.max_new_tokens), "--peer-batch", str(options.peer_batch)]
        sides = [Side(__file__, side, arguments, options.threads, folder / f"{side}.log") for side in SIDES]
        return alternate(sides, options.steps)


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of both sides."""
    arguments = parser(description)
    arguments.add_argument("--max-length", type=int, default=4096, help="RL2: tokens per microbatch")
    arguments.add_argument("--peer-batch", type=int, default=128, help="TRL: sequences per microbatch")
    return arguments


def main() -> None:
    arguments = step_parser(__doc__)
    arguments.add_argument("--case", choices=[case.name for case in CASES], help="only this case")
    arguments.add_argument("--folder", help=argparse.SUPPRESS)
    arguments.add_argument("--max-new-tokens", type=int, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        SIDES[options.side](Path(options.folder), options, Turns())
        return
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed; run: make setup")
    numbers: dict[str, float] = {}
    for case in CASES:
        if options.case in (None, case.name):
            suffix = "" if case.name == "ragged" else f"_{case.name}"
            results = ratios(measure(case, options), "ours", "theirs", ROWS, suffix)
            print(table(case.name, "TRL", ROWS, results, suffix) + "\n", flush=True)
            numbers |= results
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
