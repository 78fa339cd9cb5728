"""Generated tokens per second: the embedded engine, transformers and vLLM.

    python benchmarks/rollout.py [--steps 3] [--json FILE] [--vllm .venv-vllm/bin/python]

128 prompts of 20 to 60 tokens, continued at temperature 1 by a random Qwen3 of 3.3 million parameters, float32. Each
response has its own length, drawn from a long-tailed distribution (log-normal, median 60 tokens, at most 512) and fixed
for every side; there is no end token. Sides alternate in one run; times are medians.

    rl2          the embedded engine, all requests at once, its decoding step compiled (rollout.compile=true)
    plain        the same, not compiled
    generate     transformers' generate, all prompts in one batch, which runs until its longest response ends
    batches      the same in consecutive batches of 16, 32 or 64, whichever is fastest in the warm-up
    continuous   transformers' continuous batching
    vllm         a vLLM server (with --vllm), compiled, over HTTP
    vllm plain   the same, not compiled

It also counts the positions that a prefill computes for 16 prompts of 300 tokens with 8 samples each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rl_step import write_model
from turns import Side, Turns, alternate, parser

NUM_PROMPTS, VOCABULARY, MEDIAN, CAP = 128, 512, 60, 512
BATCH_SIZES = (16, 32, 64)
SIDES = ("rl2", "plain", "generate", "batches", "continuous")


def task() -> tuple[list[list[int]], list[int]]:
    """Return prompts, and the number of tokens to generate for each."""
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(20, 60))] for _ in range(NUM_PROMPTS)]
    lengths = [min(CAP, max(1, round(draw.lognormvariate(math.log(MEDIAN), 0.9)))) for _ in range(NUM_PROMPTS)]
    lengths[NUM_PROMPTS // 2] = CAP
    return prompts, lengths


def check(answers: list[list[int]], lengths: list[int]) -> None:
    assert [len(answer) for answer in answers] == lengths, "a side did not generate what it was told to"


# A side: a process that generates everything on request.


def rl2(folder: Path, turns: Turns, compiles: bool) -> None:
    from RL2.engines.embedded.engine import EmbeddedEngine
    from RL2.models.policy import load_model
    from RL2.types import Sampling

    prompts, lengths = task()
    lm = load_model(str(folder), torch.float32)
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=256, memory_share=0.5, compiles=compiles)

    async def everything() -> list[list[int]]:
        requests = (
            engine.generate(prompt, Sampling(length, seed=i))
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
        return [completion.token_ids for completion in await asyncio.gather(*requests)]

    while turns.wait():
        check(asyncio.run(everything()), lengths)
        turns.answer()


def transformers_batches(folder: Path, turns: Turns, sizes: tuple[int, ...]) -> None:
    from transformers import Qwen3ForCausalLM, StoppingCriteria, StoppingCriteriaList

    prompts, lengths = task()
    lm = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    class AtLength(StoppingCriteria):
        """Stopping criterion that ends each row at its own length."""

        def __init__(self, ends: torch.Tensor) -> None:
            self.ends = ends

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return input_ids.shape[1] >= self.ends

    def batch(first: int, size: int) -> list[list[int]]:
        of, wanted = prompts[first : first + size], torch.tensor(lengths[first : first + size])
        width = max(len(prompt) for prompt in of)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in of])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in of])
        out = lm.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=int(wanted.max()),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([AtLength(width + wanted)]),
        )
        return [row[width : width + n].tolist() for row, n in zip(out, wanted, strict=True)]

    def everything(size: int) -> float:
        begun = time.perf_counter()
        check([answer for first in range(0, NUM_PROMPTS, size) for answer in batch(first, size)], lengths)
        return time.perf_counter() - begun

    torch.manual_seed(0)
    turns.wait()
    size = min(sizes, key=everything)
    turns.answer(size=size)
    while turns.wait():
        everything(size)
        turns.answer(size=size)


def continuous(folder: Path, turns: Turns) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen3ForCausalLM

    prompts, lengths = task()
    lm = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=CAP, eos_token_id=-1, pad_token_id=0)
    manager = lm.init_continuous_batching(
        generation_config=settings, continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.2)
    )
    manager.start()
    while turns.wait():
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            manager.add_request(prompt, request_id=f"{number}", max_new_tokens=length)
        answers: dict[int, list[int]] = {}
        while len(answers) < NUM_PROMPTS:
            result = manager.get_result(timeout=60)
            assert result is not None and not result.error, result
            answers[int(result.request_id)] = result.generated_tokens
        check([answers[number] for number in range(NUM_PROMPTS)], lengths)
        turns.answer()
    manager.stop(block=True)


def vllm(folder: Path, turns: Turns, python: str, compiles: bool) -> None:
    """Run a vLLM server, called as in training; its processor time is measured separately."""
    import secrets

    import httpx
    import psutil
    from transformers import AutoConfig

    from RL2.config.load import load
    from RL2.engines.served.server import Server, free_port
    from RL2.engines.vllm.server_spec import VLLM_SERVER, server_arguments
    from RL2.types import Sampling

    prompts, lengths = task()
    engine = "rollout.engine=vllm rollout.vllm.args=[--load-format,auto]"
    unused = "train_data.path=x train_data.prompts_per_rollout=2 rollout.env_path=x trainer.experiment_name=x"
    settings = f"actor.model_name={folder} actor.max_length_per_device=640 {engine} {unused} rollout.compile={compiles}"
    rollout = load("ppo", [*settings.split(), "rollout.train_sampling_params.max_new_tokens=1"]).rollout
    arguments = server_arguments(rollout, AutoConfig.from_pretrained(folder), torch.float32, 640)
    token, log = secrets.token_hex(8), folder / f"server-{compiles}.log"
    place = {"log": log, "folder": folder / f"server-{compiles}"}
    server = Server(VLLM_SERVER, python, arguments, {}, token, name="vLLM", port=free_port(), **place)
    server.start()
    server.wait_until_healthy(120)
    assert server.process is not None
    process = psutil.Process(server.process.pid)

    async def everything() -> list[list[int]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, trust_env=False) as http:
            requests = (
                server.client.generate(http, prompt, Sampling(length, seed=i), 300)
                for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            )
            return [answer.token_ids for answer in await asyncio.gather(*requests)]

    def cpu_s() -> float:
        times = (each.cpu_times() for each in (process, *process.children(recursive=True)))
        return sum(each.user + each.system for each in times)

    try:
        while turns.wait():
            begun = cpu_s()
            check(asyncio.run(everything()), lengths)
            turns.answer(cpu_s=cpu_s() - begun)
    finally:
        server.stop()


def prefill_work(folder: Path) -> tuple[int, int]:
    """Return the positions that prefill computes for 16 prompts with 8 samples each, and without sharing."""
    from RL2.engines.embedded.engine import EmbeddedEngine
    from RL2.engines.embedded.packed import PackedForward
    from RL2.models.policy import load_model
    from RL2.types import Sampling

    engine = EmbeddedEngine(
        load_model(str(folder), torch.float32), decode=str, max_running_requests=256, memory_share=0.5
    )
    draw = random.Random(1)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(300)] for _ in range(16)]

    async def everything() -> None:
        requests = [engine.generate(prompt, Sampling(1, seed=n)) for prompt in prompts for n in range(8)]
        await asyncio.gather(*requests)

    asyncio.run(everything())
    assert isinstance(engine.model, PackedForward)
    return engine.model.prefilled, 16 * 8 * 300


def run_side(options: argparse.Namespace) -> None:
    turns = Turns()
    torch.set_num_threads(options.threads)
    name, folder = options.side, options.folder
    if name in ("rl2", "plain"):
        rl2(folder, turns, compiles=name == "rl2")
    elif name == "generate":
        transformers_batches(folder, turns, (NUM_PROMPTS,))
    elif name == "batches":
        transformers_batches(folder, turns, BATCH_SIZES)
    elif name in ("vllm", "vllm plain"):
        vllm(folder, turns, options.vllm, compiles=name == "vllm")
    else:
        continuous(folder, turns)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--vllm", help="interpreter of an environment with vLLM (make engine: .venv-vllm/bin/python)")
    options.set_defaults(steps=3)
    arguments = options.parse_args()
    if arguments.side:
        run_side(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, end_probability=0.0, end=0, pad=0)
        settings = ["--folder", name, "--threads", str(arguments.threads)]
        settings += ["--vllm", arguments.vllm] if arguments.vllm else []
        names = (*SIDES, "vllm", "vllm plain") if arguments.vllm else SIDES
        sides = [Side(__file__, side, settings, arguments.threads, folder / f"{side}.log") for side in names]
        steps = alternate(sides, arguments.steps)
        shared, alone = prefill_work(folder)
    tokens = sum(task()[1])
    rates = {side: tokens / median(step["step_s"] for step in of) for side, of in steps.items()}
    print(f"{tokens} tokens in {NUM_PROMPTS} responses of up to {CAP}, {arguments.threads} threads")
    for side, rate in rates.items():
        cpu_s = median(step["cpu_s"] for step in steps[side])
        size = f"  (of {steps[side][0]['size']:.0f})" if side == "batches" else ""
        print(f"  {side:<12}{rate:>8.0f} tokens/s {rates['rl2'] / rate:>8.2f} {cpu_s:>8.2f} s CPU{size}")
    print(f"prefill of 16 groups of 8: {shared} positions, {alone} without sharing")
    numbers = {f"{side}_tokens_per_s": rate for side, rate in rates.items()}
    peers = {side: rate for side, rate in rates.items() if side not in ("rl2", "plain")}
    numbers["speedup_over_best_peer"] = rates["rl2"] / max(peers.values())
    numbers |= {"prefill_positions": shared, "prefill_positions_alone": alone}
    print(f"speedup_over_best_peer {numbers['speedup_over_best_peer']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
