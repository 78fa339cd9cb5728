"""One step of supervised fine-tuning and of DPO in RL2 and in TRL's SFTTrainer and DPOTrainer, on ragged data.

    make setup
    python benchmarks/supervised.py [--steps 5] [--json FILE]

Both sides train the same random Qwen3 of 3.3 million parameters in float32, with one optimizer step on the same 32 rows
each time. Sequences have 20 to 400 tokens, uniformly distributed; in DPO a prompt has half of its pair's longer
sequence. Tokens are counted as in TRL: all that are not padding, including the prompts of both sequences of a pair. RL2
computes a prompt that two sequences share once, TRL twice.

Each side is a separate process. Sides alternate step by step and times are medians, so that load affects both alike.
TRL has its fastest settings for this case: no gradient checkpointing, the reference's log-probabilities computed before
(as in RL2), no logging or saving. Its packing needs kernels that a CPU does not have, so it pads; microbatches of 8
rows (--peer-batch) were its fastest. RL2's are bounded in tokens (--max-length).

`token_utilisation` is the share of real tokens among the positions that run through the model in the SFT step (RL2: its
linear layers). Attention on a CPU works on padded blocks; `attention_utilisation` is the share of real tokens there.
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
from typing import Any

import torch
from rl_step import write_model
from turns import Rows, Side, Steps, Turns, alternate, parser, ratios, table

NUM_ROWS, SHORTEST, LONGEST = 32, 20, 400
LEARNING_RATE = 1e-5
CASES = ("sft", "dpo")


# The task: a folder with a model, its tokenizer and rows.


def write_task(folder: Path, case: str) -> None:
    from RL2.tools.reproduce.model import build_tokenizer

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(300)]
    tokenizer = build_tokenizer(" ".join(rng.choices(words, k=40)) for _ in range(300))
    tokenizer.save_pretrained(folder)

    def text(tokens: int) -> str:
        """Return a text of about so many tokens; it begins with a blank, so that no token crosses its beginning."""
        found = ""
        while len(tokenizer.encode(found)) < tokens:
            found += " " + rng.choice(words)
        return found

    rows = []
    for number in range(NUM_ROWS):
        length = SHORTEST + (LONGEST - SHORTEST) * number // (NUM_ROWS - 1)
        prompt = length // 2 if case == "dpo" else length // 4
        row = {"prompt": text(prompt)}
        longer, shorter = (text(n) for n in (length - prompt, rng.randint(5, max(6, length - prompt))))
        chosen, rejected = rng.sample((longer, shorter), 2)
        rows.append(row | ({"chosen": chosen, "rejected": rejected} if case == "dpo" else {"response": longer}))
    rng.shuffle(rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_model(folder, 0.01, tokenizer.eos_token_id, tokenizer.pad_token_id)


# A side: a process that makes one step on request.


class Positions:
    """Counter of the positions that run through a model."""

    def __init__(self, lm: Any) -> None:
        self.number = 0
        lm.get_input_embeddings().register_forward_hook(self)

    def __call__(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.number += output.shape[0] * output.shape[1]

    def take(self) -> int:
        number, self.number = self.number, 0
        return number


def ours(folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    """Run the loop of RL2.trainer.supervised.fit, without its report."""
    from functools import partial

    from RL2.batch.packing import loss_weights, microbatches, sequence_weights
    from RL2.config.load import load
    from RL2.data.preference import load_pairs
    from RL2.data.sft import load_examples
    from RL2.models.policy import load_tokenizer
    from RL2.objectives.preference import dpo
    from RL2.objectives.spo import cross_entropy
    from RL2.ops.attention import PackedAttention
    from RL2.parallel.processes import Processes
    from RL2.trainer import supervised
    from RL2.trainer.dpo_loop import with_reference
    from RL2.types import StatsRequest, TokenBatch
    from RL2.workers.learner import Learner

    config = load(
        options.case,
        [
            f"data.path={folder}/rows.jsonl",
            "data.max_length=512",
            f"data.batch_size={NUM_ROWS}",
            f"actor.model_name={folder}",
            f"actor.max_length_per_device={options.max_length}",
            "actor.gradient_checkpointing=false",
            f"actor.lr={LEARNING_RATE}",
            "actor.scheduler=constant",
            "trainer.experiment_name=benchmark",
        ],
    )
    processes = Processes.start(60)
    tokenizer = load_tokenizer(str(folder))
    loss: Callable[..., Any]
    weights: Callable[[TokenBatch], torch.Tensor]
    if options.case == "sft":
        examples, _ = load_examples(config.data.path, tokenizer, None, 512)
        rows = supervised.Rows(examples.ids, examples.trains, per_row=1)
        loss, weights = cross_entropy, partial(loss_weights, train_on="all", level="token", average_over="all")
    else:
        pairs, _ = load_pairs(config.data.path, tokenizer, None, 512)
        rows = with_reference(supervised.Rows(pairs.ids, pairs.trains, per_row=2), config, processes)
        loss, weights = partial(dpo, beta=0.1), sequence_weights
    learner = Learner(config.actor, processes, 1000, folder)
    computed = Positions(learner.lm)

    def real(batch: TokenBatch) -> int:
        return len(batch.token_ids_T) + batch.num_sequences  # the last token of a sequence takes no position

    while turns.wait():
        batch = rows.draw(list(range(NUM_ROWS)))
        metrics = learner.step(batch.with_(weight_T=weights(batch)), loss, StatsRequest(("logp",)))
        cuts = microbatches(batch, range(batch.num_sequences), options.max_length, 1)[0]
        shapes = [shape for ids in cuts for shape in PackedAttention(batch.sequences(ids).cu_seqlens).shapes]
        padded = sum(rows * length for rows, length in shapes)
        turns.answer(
            tokens=real(batch),
            utilisation=len(batch.token_ids_T) / computed.take(),
            attention_utilisation=len(batch.token_ids_T) / padded,
            loss=metrics["loss"],
        )
    processes.stop()


def theirs(folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    """Run TRL's trainer, with a callback that waits between steps."""
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
        "gradient_accumulation_steps": NUM_ROWS // options.peer_batch,
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
        # no epoch ends within the benchmark
        train_dataset=datasets.Dataset.from_list(rows * (options.steps + 2)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Gate()],
    )
    trainer.train()


SIDES: dict[str, Callable[[Path, argparse.Namespace, Turns], None]] = {"ours": ours, "theirs": theirs}


# The parent lets the sides alternate and compares them.


def measure(case: str, options: argparse.Namespace) -> Steps:
    """Return the steps of both sides, after a warm-up of one step each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, case)
        arguments = ["--folder", name, "--threads", str(options.threads), "--max-length", str(options.max_length)]
        arguments += ["--case", case, "--peer-batch", str(options.peer_batch), "--steps", str(options.steps)]
        sides = [Side(__file__, side, arguments, options.threads, folder / f"{side}.log") for side in SIDES]
        return alternate(sides, options.steps)


ROWS: Rows = (
    ("step, s", "step_s", "speedup", "{:.2f}"),
    ("processor, s", "cpu_s", "cpu_speedup", "{:.2f}"),
    ("memory of the steps, MB", "memory_mb", "memory_ratio", "{:.0f}"),
)


def compare(case: str, steps: Steps) -> dict[str, float]:
    """Return the result of `ratios`, tokens per second and, for SFT, the utilisation."""
    numbers = ratios(steps, "ours", "theirs", ROWS)
    mine, peer = steps["ours"][0], steps["theirs"][0]
    assert mine["tokens"] == peer["tokens"]
    numbers |= {f"{who}tokens_per_s": mine["tokens"] / numbers[f"{who}step_s"] for who in ("", "peer_")}
    print(table(case, "TRL", ROWS, numbers))
    print("  {:<30}{:>10.0f}{:>10.0f}".format("tokens / s", numbers["tokens_per_s"], numbers["peer_tokens_per_s"]))
    found = {f"{case}_{name}": value for name, value in numbers.items()}
    if case == "sft":
        found |= {"token_utilisation": mine["utilisation"], "peer_token_utilisation": peer["utilisation"]}
        found["attention_utilisation"] = mine["attention_utilisation"]
        print("  {:<30}{:>10.3f}{:>10.3f}".format("token utilisation", mine["utilisation"], peer["utilisation"]))
        print("  {:<30}{:>10.3f}".format("of attention's blocks", mine["attention_utilisation"]))
    print(flush=True)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--max-length", type=int, default=2048, help="RL2: tokens per microbatch")
    arguments.add_argument("--peer-batch", type=int, default=8, help="TRL: rows per microbatch")
    arguments.add_argument("--case", choices=CASES, help="only this case")
    arguments.add_argument("--folder", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        SIDES[options.side](Path(options.folder), options, Turns())
        return
    if importlib.util.find_spec("trl") is None:
        sys.exit("TRL is not installed; run: make setup")
    numbers: dict[str, float] = {}
    for case in CASES:
        if options.case in (None, case):
            numbers |= compare(case, measure(case, options))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
