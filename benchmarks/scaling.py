"""An update on 1, 2 and 4 processes: seconds, memory, and traffic against the formula of docs/scaling.md.

    python benchmarks/scaling.py [--steps 3] [--json FILE]

A random Qwen3 of 4 million parameters, `ppo` with entropy, float32, gloo, one thread per process, recomputed
activations. *Same work*: 24 sequences of 100 to 400 tokens per step for any number of processes; *same a process*: 12
for each part of the data. Layouts run in sequence. CPU is the time of all processes together: with fewer or busy cores
it shows what is computed twice and what communication costs, and seconds are not informative. Memory is the peak that
loading and updating add, on the process where it is largest. Sent is the most that a process sends per step, as a ring
would; minor traffic such as metrics is counted but not in the formula.
"""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing as mp
from traffic import Traffic
from transformers import Qwen3Config, Qwen3ForCausalLM
from turns import memory_mb, parser

from RL2.batch.packing import loss_weights, pack
from RL2.config.load import load
from RL2.parallel.cost import Layout, Shape, traffic
from RL2.parallel.processes import Processes
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.actor import Actor

LAYOUTS = {
    "one process": Layout(),
    "fsdp 2": Layout(fsdp=2),
    "replicas 2": Layout(ddp=2),
    "tp 2": Layout(tp=2),
    "sp 2": Layout(sp=2),
    "fsdp 4": Layout(fsdp=4),
    "hsdp 2 x 2": Layout(ddp=2, fsdp=2),
    "fsdp 2 x tp 2": Layout(fsdp=2, tp=2),
    "fsdp 2 x sp 2": Layout(fsdp=2, sp=2),
    "tp 2 x sp 2": Layout(tp=2, sp=2),
}
SAME, EACH = 24, 12
MAX_LENGTH = 1024
VOCABULARY = 4096


def make_batch(sequences: int) -> TokenBatch:
    draw = random.Random(0)
    trajectories = []
    for n in range(sequences):
        length = draw.randint(100, 400)
        ids = [draw.randrange(VOCABULARY) for _ in range(length)]
        mask = [False] * 40 + [True] * (length - 40)
        zeros = [0.0] * length
        trajectories.append(Trajectory(n, n, 0, [Sequence(ids, mask, [-9.0 * a for a in mask], zeros)]))
    batch = pack(trajectories)
    g = torch.Generator().manual_seed(0)
    return batch.with_(advantage_T=torch.randn(len(batch.labels_T), generator=g))


def member(rank: int, layout: Layout, sequences: int, steps: int, folder: Path, port: int) -> None:
    """Run one process of a layout; write its numbers to `folder`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(layout.size), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    processes = Processes.start(timeout_s=600)
    batch, idle_mb = make_batch(sequences), memory_mb("VmRSS")
    overrides = f"""actor.model_name={folder} actor.max_length_per_device={MAX_LENGTH // layout.sp}
        actor.ddp_size={layout.ddp} actor.sp_size={layout.sp} actor.tp_size={layout.tp} actor.entropy.coef=0.001
        train_data.path=x train_data.prompts_per_rollout=2 rollout.env_path=x
        rollout.train_sampling_params.max_new_tokens=1 trainer.experiment_name=x"""
    actor = Actor(load("ppo", overrides.split()).actor, processes, 100, folder)
    seconds, cpu_s = [], []
    for _ in range(steps + 1):
        processes.wait()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        actor.update(batch)
        cpu_s.append(time.process_time() - begun_cpu)
        processes.wait()
        seconds.append(time.perf_counter() - begun)
    peak_mb = memory_mb("VmHWM") - idle_mb
    weight_T = loss_weights(batch, train_on="all", level="token", average_over="all")
    with Traffic() as seen:
        actor.backward(batch.with_(weight_T=weight_T), actor.loss, actor.request)
    microbatches = actor.share(batch, range(sequences), actor.config.max_length_per_device)
    chosen = [batch.sequences(ids or [int(batch.lengths_B.argmin())]) for ids in microbatches]
    said = traffic(
        Shape.of(actor.lm.config),
        layout,
        microbatches=len(chosen),
        tokens=sum(len(m.token_ids_T) for m in chosen),
        actions=sum(int(m.action_T.sum()) for m in chosen),
        num_fields=len(actor.request.fields),
        itemsize=4,
    )
    numbers = {
        "step_s": median(seconds[1:]),
        "cpu_s": median(cpu_s[1:]),
        "memory_mb": peak_mb,
        "microbatches": len(chosen),
        "sent_mb": sum(seen.sent.values()) / 1e6,
        "formula_mb": sum(said.values()) / 1e6,
        "calls": sum(count for (_, size), count in seen.calls.items() if size > 1),
    }
    (folder / f"numbers_{rank}.json").write_text(json.dumps(numbers))
    processes.stop()


def measure(layout: Layout, sequences: int, steps: int, folder: Path) -> dict[str, float]:
    """Return the largest numbers over all processes, and the formula for the process that deviates most."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(member, args=(layout, sequences, steps, folder, port), nprocs=layout.size)
    found = [json.loads((folder / f"numbers_{rank}.json").read_text()) for rank in range(layout.size)]
    numbers = {name: max(of[name] for of in found) for name in found[0]}
    numbers["cpu_s"] = sum(of["cpu_s"] for of in found)
    off = [of["sent_mb"] / of["formula_mb"] - 1 for of in found if of["formula_mb"]]
    return numbers | {"off": max(off, key=abs, default=0.0)}


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(steps=3)
    given = options.parse_args()
    results: dict[str, dict[str, Any]] = defaultdict(dict)
    print(
        f"{'':16}{'sequences':>10}{'microbatches':>14}{'step, s':>10}{'CPU, s':>8}"
        f"{'MB':>8}{'MB sent':>10}{'formula':>9}{'calls':>7}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=True,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
        for work in ("same work", "same a process"):
            print(work)
            for title, layout in LAYOUTS.items():
                sequences = SAME if work == "same work" else EACH * layout.data
                numbers = measure(layout, sequences, given.steps, folder)
                results[work][title] = numbers
                print(
                    f"  {title:14}{sequences:10}{numbers['microbatches']:14.0f}{numbers['step_s']:10.2f}"
                    f"{numbers['cpu_s']:8.2f}{numbers['memory_mb']:8.0f}{numbers['sent_mb']:10.1f}{numbers['off']:+9.1%}{numbers['calls']:7.0f}",
                    flush=True,
                )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
