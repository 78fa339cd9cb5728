"""One step of supervised fine-tuning and of DPO in RL2 and in TRL's SFTTrainer and DPOTrainer, on ragged data.

    make setup
    python benchmarks/supervised.py [--steps 5] [--json FILE]

Both sides train the same random Qwen3 of 3.3 million parameters in float32, with one optimizer step on the same 32 rows
again and again. Sequences have 20 to 400 tokens, evenly spread; in DPO a prompt has half of its pair's longer sequence.
Tokens count as TRL counts them: all that are not padding, prompts of both sequences of a pair included. RL2 computes a
prompt that two sequences share once, TRL twice.

Each side is a process of its own. They take turns, step by step; times are medians, so that a busy machine disturbs
both alike. TRL's settings are its fast ones here: no gradient checkpointing, the reference's log-probabilities computed
before (as RL2 does), no logging or saving. Its packing needs kernels that a CPU does not have, so it pads; microbatches
of 8 rows (--peer-batch) were its fastest. RL2's are bounded in tokens (--max-length).

`token_utilisation` is the share of real tokens among the positions that run through the model in the SFT step (RL2: its
linear layers); attention on a CPU works on padded blocks, and `attention_utilisation` is the share of real ones there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rl_step import write_model
from turns import Side, Steps, Turns, alternate

ROWS, SHORTEST, LONGEST = 32, 20, 400
LEARNING_RATE = 1e-5
CASES = ("sft", "dpo")


# The task: a folder with a model, its tokenizer and rows.


def write_task(folder: Path, case: str) -> None:
    from RL2.demo.model import build_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(300)]
    tokenizer = build_tokenizer(" ".join(rng.choices(words, k=40)) for _ in range(300))
    tokenizer.save_pretrained(folder)

    def text(tokens: int) -> str:
        """Of about so many tokens; it begins with a blank, so that none lies across its beginning."""
        found = ""
        while len(tokenizer.encode(found)) < tokens:
            found += " " + rng.choice(words)
        return found

    rows = []
    for number in range(ROWS):
        length = SHORTEST + (LONGEST - SHORTEST) * number // (ROWS - 1)
        prompt = length // 2 if case == "dpo" else length // 4
        row = {"prompt": text(prompt)}
        longer, shorter = (text(n) for n in (length - prompt, rng.randint(5, max(6, length - prompt))))
        chosen, rejected = rng.sample((longer, shorter), 2)
        rows.append(row | ({"chosen": chosen, "rejected": rejected} if case == "dpo" else {"response": longer}))
    rng.shuffle(rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(folder, 0.01, tokenizer.eos_token_id, tokenizer.pad_token_id)


# A side: a process that makes one step whenever it is told to.


class Positions:
    """Counts the positions that run through a model."""

    def __init__(self, lm: Any) -> None:
        self.number = 0
        lm.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.number += output.shape[0] * output.shape[1]

    def take(self) -> int:
        number, self.number = self.number, 0
        return number


def ours(folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    """The body of RL2.trainer.supervised.fit, without its report."""
    from functools import partial

    from RL2.config import load
    from RL2.data.preference import as_responses, load_pairs
    from RL2.data.sft import load_examples
    from RL2.models.policy import load_tokenizer
    from RL2.objectives.path import cross_entropy
    from RL2.objectives.preference import dpo
    from RL2.ops.attention import PackedAttention
    from RL2.packing import loss_weights, pack, sequence_weights
    from RL2.parallel.processes import Processes
    from RL2.trainer.dpo_loop import with_reference
    from RL2.trainer.supervised import Rows
    from RL2.types import StatsRequest, TokenBatch
    from RL2.workers.worker import Learner

    config = load(
        options.case,
        [
            f"data.path={folder}/rows.jsonl",
            "data.max_length=512",
            f"data.batch_size={ROWS}",
            f"actor.model_name={folder}",
            f"actor.max_length_per_device={options.max_length}",
            "actor.gradient_checkpointing=false",
            f"actor.lr={LEARNING_RATE}",
            "actor.warmup_ratio=0",
            "trainer.experiment_name=benchmark",
        ],
    )
    processes = Processes.start(60)
    tokenizer = load_tokenizer(str(folder))
    loss: Callable[..., Any]
    weights: Callable[[TokenBatch], torch.Tensor]
    if options.case == "sft":
        rows = Rows(pack(load_examples(config.data.path, tokenizer, None, 512)[0]), per_row=1)
        loss, weights = cross_entropy, partial(loss_weights, train_on="all", level="token", average_over="all")
    else:
        pairs, _ = load_pairs(config.data.path, tokenizer, None, 512)
        rows = Rows(with_reference(pack(as_responses(pairs)), config, processes), per_row=2)
        loss, weights = partial(dpo, beta=0.1), sequence_weights
    learner = Learner(config.actor, processes, 1000, folder)
    computed = Positions(learner.lm)

    def real(batch: TokenBatch) -> int:
        return len(batch.token_ids_T) + batch.num_sequences  # the last token of a sequence takes no position

    while turns.wait():
        batch = rows.draw(list(range(ROWS)))
        metrics = learner.step(batch.with_(weight_T=weights(batch)), loss, StatsRequest(("logp",)))
        blocks = PackedAttention(batch.cu_seqlens).blocks
        padded = sum(number * length for number, length, _ in blocks)
        turns.answer(
            tokens=real(batch),
            utilisation=len(batch.token_ids_T) / computed.take(),
            attention_utilisation=len(batch.token_ids_T) / padded,
            loss=metrics["loss"],
        )
    processes.stop()


def theirs(folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    """TRL's trainer, with a callback that waits between steps."""
    import datasets
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    sft = options.case == "sft"

    class Counted(SFTTrainer if sft else DPOTrainer):  # type: ignore[misc]
        tokens, loss = 0, 0.0

        def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(model, inputs, *args, **kwargs)
            self.tokens += int(inputs["attention_mask"].sum())
            self.loss += float(found)
            return found

    class Gate(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                computed.take()
                turns.wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.answer(tokens=trainer.tokens, utilisation=trainer.tokens / computed.take(), loss=trainer.loss)
            trainer.tokens, trainer.loss = 0, 0.0
            control.should_training_stop = not turns.wait()

    settings = {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": options.peer_batch,
        "gradient_accumulation_steps": ROWS // options.peer_batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "max_length": 512,
        "max_steps": 1000,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    if sft:
        rows = [{"prompt": row["prompt"], "completion": row["response"]} for row in rows]
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    computed = Positions(lm)
    trainer = Counted(
        model=lm,
        args=SFTConfig(completion_only_loss=True, **settings)
        if sft
        else DPOConfig(beta=0.1, precompute_ref_log_probs=True, **settings),
        # no end of an epoch within the benchmark
        train_dataset=datasets.Dataset.from_list(rows * (options.steps + 2)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Gate()],
    )
    trainer.train()


SIDES: dict[str, Callable[[Path, argparse.Namespace, Turns], None]] = {"ours": ours, "theirs": theirs}


# The parent: lets the sides take turns and compares.


def measure(case: str, options: argparse.Namespace) -> Steps:
    """The steps of both sides, after a warm-up of one step each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, case)
        arguments = ["--folder", name, "--threads", str(options.threads), "--max-length", str(options.max_length)]
        arguments += ["--case", case, "--peer-batch", str(options.peer_batch), "--steps", str(options.steps)]
        sides = [Side(__file__, side, arguments, options.threads, folder / f"{side}.log") for side in SIDES]
        return alternate(sides, options.steps)


def compare(case: str, steps: Steps) -> dict[str, float]:
    """Tokens a second of both sides, and how many times ours are theirs."""
    mine, peer = steps["ours"], steps["theirs"]
    rates = {name: median(step["tokens"] / step["step_s"] for step in steps[name]) for name in SIDES}
    numbers = {
        f"{case}_speedup": rates["ours"] / rates["theirs"],
        f"{case}_tokens_per_s": rates["ours"],
        f"peer_{case}_tokens_per_s": rates["theirs"],
        f"{case}_cpu_speedup": median(s["cpu_s"] for s in peer) / median(s["cpu_s"] for s in mine),
        f"{case}_tokens": mine[0]["tokens"],
        f"peer_{case}_tokens": peer[0]["tokens"],
        f"{case}_memory_mb": max(s["memory_mb"] for s in mine),
        f"peer_{case}_memory_mb": max(s["memory_mb"] for s in peer),
    }
    if case == "sft":
        numbers |= {
            "token_utilisation": mine[0]["utilisation"],
            "attention_utilisation": mine[0]["attention_utilisation"],
            "peer_token_utilisation": peer[0]["utilisation"],
        }
    return numbers


def table(case: str, numbers: dict[str, float]) -> str:
    rows = [("tokens a second", "tokens_per_s"), ("tokens a step", "tokens"), ("memory of the steps, MB", "memory_mb")]
    lines = [f"{case:<28}{'RL2':>10}{'TRL':>10}"]
    lines += [f"{title:<28}{numbers[f'{case}_{k}']:>10.0f}{numbers[f'peer_{case}_{k}']:>10.0f}" for title, k in rows]
    if case == "sft":
        mine, peer = numbers["token_utilisation"], numbers["peer_token_utilisation"]
        lines.append(f"{'token utilisation':<28}{mine:>10.3f}{peer:>10.3f}")
        lines.append(f"{'  in attention':<28}{numbers['attention_utilisation']:>10.3f}")
    speedup, cpu = numbers[f"{case}_speedup"], numbers[f"{case}_cpu_speedup"]
    return "\n".join([*lines, f"RL2 is {speedup:.2f} times as fast ({cpu:.2f} in processor time)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=5, help="steps of each side after the warm-up")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--max-length", type=int, default=2048, help="RL2: tokens of a microbatch")
    parser.add_argument("--peer-batch", type=int, default=8, help="TRL: rows of a microbatch")
    parser.add_argument("--case", choices=CASES, help="only this case")
    for hidden in ("--side", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        SIDES[options.side](Path(options.folder), options, Turns())
        return
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed; run: make setup")
    numbers: dict[str, float] = {}
    for case in CASES:
        if options.case in (None, case):
            results = compare(case, measure(case, options))
            print(table(case, results) + "\n", flush=True)
            numbers |= results
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
