"""Long run with injected faults: does memory grow, are rows lost or repeated?

    python benchmarks/soak.py [--steps 2000] [--engine vllm] [--out FOLDER] [--json FILE] [--plot FILE.svg]

`spo` on word problems, 4 prompts with 4 samples per step, a model of 245,000 parameters, rollouts from a server (vllm:
the one of `make engine`; sglang: the tests' stand-in; embedded: none). Of the environment's calls 2% raise, 1% answer
too late, 1% return NaN, 1% return something that is not a result, and every 4,000th blocks its thread. About every 50
steps a process of the server is killed (SIGKILL). Random choices follow `--seed`.

At the end all of these must hold, or the exit code is 1:

    rows         each row was trained on once per epoch, in the order of the epoch, with all its samples
    environment  it was called once per trajectory; as many are unscored as calls failed
    memory       the trainer's mean over the last tenth of the steps is at most 5% above that of the second tenth
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import psutil
from tqdm import tqdm

from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems, write_rows

ROOT = Path(__file__).parents[1]
PROMPTS, SAMPLES, ROWS = 4, 4, 250
LOOK_EVERY_S = 0.5
STEP_LIMIT_S = 300
"""Seconds without a step after which the run counts as hanging."""
CALL_LIMIT_S = 0.5
LAUNCHER = "launch.py"
"""Last part of the path that starts a server of either engine."""

ENVIRONMENT = """
import asyncio, itertools, json, time
from random import Random

calls = itertools.count()
SHARES = dict(raises=0.02, late=0.01, nan=0.01, odd=0.01)


async def step(state, action, extra_info):
    number = next(calls)
    draw = Random(f"{seed} {{number}}").random()
    fault = next((name for name, share in SHARES.items() if (draw := draw - share) < 0), "")
    fault = "blocks" if number % 4000 == 3999 else fault
    with open({ledger!r}, "a") as ledger:
        ledger.write(json.dumps(dict(row=extra_info["row"], fault=fault)) + "\\n")
    if fault == "raises":
        raise ConnectionError("the judge has hung up")
    if fault == "late":
        await asyncio.sleep(10 * {limit_s})
    if fault == "blocks":
        time.sleep(3 * {limit_s})
    if fault == "odd":
        return [1.0]
    reward = float("nan") if fault == "nan" else float(any(character.isdigit() for character in action))
    return dict(next_state=None, reward=reward, score=reward, done=True, extra_info=extra_info)
"""


def prepare(folder: Path, seed: int) -> None:
    rng = Random(seed)
    pairs = [(p.question, Demonstrator().solve(p, rng)) for p in draw_problems(rng, ROWS, held_out=False)]
    build_model(folder / "model", [text for pair in pairs for text in pair], seed)
    write_rows(folder / "rows.jsonl", [{"prompt": q, "extra_info": {"row": n}} for n, (q, _) in enumerate(pairs)])
    script = ENVIRONMENT.format(seed=seed, ledger=str(folder / "calls.jsonl"), limit_s=CALL_LIMIT_S)
    (folder / "environment.py").write_text(script)


def start(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    engine = arguments.engine
    python = sys.executable if engine == "sglang" else f"{ROOT}/.venv-vllm/bin/python"
    servers = [f"rollout.{engine}.python={python}", f"rollout.{engine}.max_restarts=100000"]
    if engine == "sglang":
        servers.append(f"rollout.sglang.env.PYTHONPATH='{ROOT}/tests/engines/stand_in:{ROOT}'")
    settings = [
        f"train_data.path={folder}/rows.jsonl",
        f"train_data.prompts_per_rollout={PROMPTS}",
        f"train_data.responses_per_prompt={SAMPLES}",
        f"actor.model_name={folder}/model",
        "actor.max_length_per_device=1024",
        "actor.lr=1e-4",
        f"rollout.engine={engine}",
        *(servers if engine != "embedded" else []),
        "rollout.train_sampling_params.max_new_tokens=16",
        "rollout.max_running_requests=16",
        f"rollout.env_path={folder}/environment.py",
        f"rollout.env_timeout_s={CALL_LIMIT_S}",
        "trainer.n_epochs=100000",
        f"trainer.max_steps={arguments.steps}",
        f"trainer.samples_per_step={PROMPTS * SAMPLES}",
        "trainer.save_freq=100",
        "trainer.keep=2",
        "trainer.experiment_name=soak",
        f"trainer.save_dir={folder}/run",
        f"trainer.seed={arguments.seed}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-m", "RL2.trainer.spo", *settings]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def watch(run: subprocess.Popen[bytes], folder: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return rows of step, seconds, MiB of the trainer and the servers, and kills so far, until the run ends."""
    draw, trainer = Random(f"{arguments.seed} kills"), psutil.Process(run.pid)
    begun = stepped = time.monotonic()
    seen, kills, step, kill_at = list[dict[str, float]](), 0, 0, arguments.kill_every
    metrics = folder / "run" / "metrics.jsonl"
    with tqdm(total=arguments.steps, desc="steps") as bar:
        while run.poll() is None:
            time.sleep(LOOK_EVERY_S)
            now, done = time.monotonic(), metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            bar.update(done - step)
            if done > step:
                step, stepped = done, now
            elif now - stepped > STEP_LIMIT_S:
                run.kill()
                raise SystemExit(f"no step in {STEP_LIMIT_S} s after step {step}: see {folder}/log")
            try:
                servers = server_processes(trainer)
                mib = [process.memory_info().rss / 2**20 for process in (trainer, *servers)]
            except psutil.NoSuchProcess:  # a process has just ended
                continue
            seen.append(
                {"step": step, "s": now - begun, "trainer_mib": mib[0], "servers_mib": sum(mib[1:]), "kills": kills}
            )
            if servers and step >= kill_at:
                draw.choice(servers).kill()
                kills, kill_at = kills + 1, step + round(arguments.kill_every * draw.uniform(0.5, 1.5))
    return seen


def server_processes(trainer: psutil.Process) -> list[psutil.Process]:
    """Return the living processes of the trainer's servers, without its other children (one watches templates)."""
    servers = [child for child in trainer.children() if any(Path(part).name == LAUNCHER for part in child.cmdline())]
    processes = [process for server in servers for process in (server, *server.children(recursive=True))]
    return [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]


def rows(file: Path) -> list[dict[str, Any]]:
    with file.open() as lines:
        return [json.loads(line) for line in lines]


def check(
    folder: Path, seen: list[dict[str, float]], steps: int, max_growth: float
) -> tuple[dict[str, Any], list[str]]:
    """Return the numbers, and the conditions that do not hold."""
    samples, calls = rows(folder / "run" / "samples.jsonl"), rows(folder / "calls.jsonl")
    wrong = []
    groups = dict[tuple[int, int], list[tuple[int, int]]]()
    for sample in samples:
        groups.setdefault((sample["step"], sample["group"]), []).append((sample["row"], sample["sample"]))
    if sorted(groups) != [(step, group) for step in range(steps) for group in range(PROMPTS)]:
        wrong.append(f"rows: {len(groups)} groups, not {PROMPTS} of {steps} steps")
    for place, of in groups.items():
        if sorted(of) != [(of[0][0], sample) for sample in range(SAMPLES)]:
            wrong.append(f"rows: group {place} has rows and samples {of}")
    drawn = [of[0][0] for _, of in sorted(groups.items())]
    for epoch in range(0, len(drawn), ROWS):
        part = drawn[epoch : epoch + ROWS]
        if len(set(part)) != len(part):
            wrong.append(f"rows: a row occurs twice in epoch {epoch // ROWS}")
    faults = Counter(call["fault"] for call in calls if call["fault"])
    unscored = Counter(sample["unscored"] is not None for sample in samples)[True]
    if len(calls) != len(samples) or Counter(c["row"] for c in calls) != Counter(s["row"] for s in samples):
        wrong.append(f"environment: {len(calls)} calls for {len(samples)} trajectories")
    if unscored != sum(faults.values()):
        wrong.append(f"environment: {unscored} unscored, {sum(faults.values())} calls failed")
    tenth = max(1, steps // 10)
    early = [at["trainer_mib"] for at in seen if tenth <= at["step"] < 2 * tenth]
    late = [at["trainer_mib"] for at in seen if at["step"] >= steps - tenth]
    growth = fmean(late) / fmean(early) - 1
    if growth > max_growth:
        wrong.append(f"memory: the trainer's has grown by {growth:.1%}, from {fmean(early):.0f} MiB")
    metrics = rows(folder / "run" / "metrics.jsonl")
    numbers = {
        "steps": len(metrics),
        "minutes": seen[-1]["s"] / 60,
        "trajectories": len(samples),
        "epochs": len(drawn) / ROWS,
        "kills": seen[-1]["kills"],
        "restarts": metrics[-1].get("engine/restarts", 0.0),
        "retried": sum(row.get("engine/retried", 0.0) for row in metrics),
        "faults": dict(faults),
        "unscored": unscored,
        "early_mib": fmean(early),
        "late_mib": fmean(late),
        "growth": growth,
    }
    return numbers, wrong


def plot(seen: list[dict[str, float]], file: Path) -> None:
    """Plot the trainer's memory over the steps, and the kills of servers, as plain SVG."""
    width, height, left, top = 720, 240, 56, 20
    last, highest = max(at["step"] for at in seen), 1.15 * max(at["trainer_mib"] for at in seen)

    def x(step: float) -> float:
        return left + (width - left - 16) * step / last

    def y(mib: float) -> float:
        return height - 36 - (height - 36 - top) * mib / highest

    line = " ".join(f"{x(at['step']):.1f},{y(at['trainer_mib']):.1f}" for at in seen)
    killed = [b for a, b in pairwise(seen) if b["kills"] > a["kills"]]
    marks = "".join(
        f'<line x1="{x(at["step"]):.1f}" x2="{x(at["step"]):.1f}" y1="{y(0) - 6:.1f}" y2="{y(0):.1f}" class="kill"/>'
        for at in killed
    )
    grid = ""
    for n in range(0, int(highest) + 1, 200):
        grid += f'<line x1="{left}" x2="{width - 16}" y1="{y(n):.1f}" y2="{y(n):.1f}" class="grid"/>'
        grid += f'<text x="{left - 6}" y="{y(n) + 4:.1f}" text-anchor="end">{n}</text>'
    for n in range(0, int(last) + 1, max(1, int(last) // 5)):
        grid += f'<text x="{x(n):.1f}" y="{height - 18}" text-anchor="middle">{n}</text>'
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="memory of the trainer over the steps"><style>svg{background:#fff}text{font:12px sans-serif;'
        "fill:#555}.grid{stroke:#ddd}.kill{stroke:#c0392b;stroke-width:1.5}polyline{fill:none;stroke:#2563a8;"
        f'stroke-width:1.5}}</style>{grid}{marks}<polyline points="{line}"/>'
        f'<text x="{left}" y="{top - 6}">MiB of the trainer</text>'
        f'<text x="{width - 16}" y="{height - 4}" text-anchor="end">step; red: the server was killed</text></svg>\n'
    )


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--engine", choices=("vllm", "sglang", "embedded"), default="vllm")
    options.add_argument("--kill-every", type=int, default=50, help="steps between kills, on average")
    options.add_argument("--max-growth", type=float, default=0.05, help="limit of the growth of the trainer's memory")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="folder for the run; default: a temporary one")
    options.add_argument("--json", type=Path, help="write the numbers to this file")
    options.add_argument("--plot", type=Path, help="write the plot to this file")
    arguments = options.parse_args()
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="rl2-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, arguments.seed)
    run = start(folder, arguments)
    try:
        seen = watch(run, folder, arguments)
    finally:
        run.terminate()
    if run.wait(60) != 0:
        raise SystemExit(f"the run ended with exit code {run.returncode}: see {folder}/log")
    numbers, wrong = check(folder, seen, arguments.steps, arguments.max_growth)
    print(json.dumps(numbers, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n")
    if arguments.plot:
        plot(seen, arguments.plot)
    for line in wrong[:20]:
        print(line)
    if wrong:
        raise SystemExit(1)
    if arguments.out is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
