"""A long run of `spo` under faults: is every row drawn once in each epoch, and does memory stay where it is?

    make setup
    python benchmarks/soak.py [--steps 2000] [--seed 0] [--out runs/soak] [--json FILE] [--svg FILE]

A random Qwen3 of some 50,000 parameters learns the demo's word problems, four prompts of four responses a step, with a
checkpoint every 25 steps. Its rollouts come from a server that the run launches: the stand-in of the tests, which has
SGLang's routes and samples with the embedded engine (--engine embedded: this process samples, and there is no server to
kill). What goes wrong, all drawn from --seed:

    environment   one call in 100 raises; one in 400 never comes back; one in 800 blocks the interpreter's thread
    servers       killed with SIGKILL at --engine-kills moments over the whole run
    the trainer   killed with SIGKILL at --trainer-kills moments of the first tenth, and resumed from its checkpoint

The ledger is read from samples.jsonl, which has every trajectory, and from what the environment writes down itself.
Memory is the resident set of the trainer and of its children, read five times a second; growth is within the trainer's
last life: the median over the last quarter of the steps after the warm-up, against that over the first. The exit code
is 1 if a row was lost or doubled, or memory has grown by more than 5%.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT / "tests/engines/stand_in"
NUM_ROWS, PROMPTS, RESPONSES = 150, 4, 4
SAVE_FREQ = 25
POLL_S = 0.2
STILL_S = 180
"""Without a step for so long, the run hangs."""
MAX_GROWTH = 0.05

ENVIRONMENT = """\
import asyncio
import os
import random
import time
import zlib

LEDGER = {ledger!r}
FAULTS = {{"raises": 1 / 100, "never": 1 / 400, "blocks": 1 / 800}}


async def step(state, action, extra_info):
    draw = random.Random(zlib.crc32(f"{seed} {{extra_info['row']}} {{action}}".encode())).random()
    fault = "none"
    for name, share in FAULTS.items():
        if fault == "none" and draw < share:
            fault = name
        draw -= share
    with open(LEDGER, "a") as ledger:
        ledger.write(f"{{os.getpid()}} {{extra_info['row']}} {{fault}}\\n")
    if fault == "raises":
        raise RuntimeError("injected")
    if fault == "never":
        await asyncio.sleep(3600)
    if fault == "blocks":
        time.sleep(3)
    reward = float(any(character.isdigit() for character in action))
    return dict(next_state=None, reward=reward, score=reward, done=True, extra_info=extra_info)
"""


@dataclass
class Soak:
    """What was seen."""

    steps: int
    warm_up: int
    seed: int
    engine: str
    seconds: float = 0.0
    engine_kills: list[int] = field(default_factory=list)
    """Steps that were done when a server was killed."""
    trainer_kills: list[int] = field(default_factory=list)
    lives: list[int] = field(default_factory=list)
    """The step that each life of the trainer began with."""
    rows_drawn: int = 0
    epochs: int = 0
    """Whole ones."""
    problems: list[str] = field(default_factory=list)
    """Of the ledger."""
    faults: dict[str, int] = field(default_factory=dict)
    """Injected into the environment, in all lives."""
    unscored: int = 0
    """Trajectories of the run that is left."""
    curve: list[tuple[int, int, float, float]] = field(default_factory=list)
    """(life, step, MiB of the trainer, MiB of its children)."""
    growth: dict[str, float] = field(default_factory=dict)
    """Of the medians of memory, as a share; empty where the last life was too short to tell."""

    @property
    def holds(self) -> bool:
        return not self.problems and all(growth <= MAX_GROWTH for growth in self.growth.values())


def write_world(out: Path, seed: int) -> None:
    """A model, rows and an environment."""
    import torch
    from transformers import AutoConfig, Qwen3ForCausalLM

    from RL2.demo.model import build_model
    from RL2.demo.problems import Demonstrator, draw_problems

    rng = random.Random(seed)
    problems = draw_problems(rng, NUM_ROWS, held_out=False)
    solutions = [Demonstrator().solve(problem, rng) for problem in problems]
    build_model(out / "model", [*(problem.question for problem in problems), *solutions], seed)
    config = AutoConfig.from_pretrained(out / "model")
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 48, 96, 2
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(out / "model")
    rows = [{"prompt": problem.question, "extra_info": {"row": n}} for n, problem in enumerate(problems)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "environment.py").write_text(ENVIRONMENT.format(ledger=str(out / "ledger.txt"), seed=seed))


def command(out: Path, soak: Soak) -> list[str]:
    served = [
        "rollout.engine=sglang",
        f"rollout.sglang.python={sys.executable}",
        f"rollout.sglang.env.PYTHONPATH='{STAND_IN}:{ROOT}'",
        "rollout.sglang.max_restarts=1000",
    ]
    return [
        *(sys.executable, "-m", "RL2.trainer.spo"),
        f"train_data.path={out}/rows.jsonl",
        f"train_data.prompts_per_rollout={PROMPTS}",
        f"train_data.responses_per_prompt={RESPONSES}",
        f"actor.model_name={out}/model",
        "actor.max_length_per_device=512",
        "actor.lr=1e-4",
        "rollout.train_sampling_params.max_new_tokens=8",
        "rollout.max_running_requests=16",
        f"rollout.env_path={out}/environment.py",
        "rollout.env_timeout_s=1",
        "trainer.experiment_name=soak",
        f"trainer.seed={soak.seed}",
        f"trainer.max_steps={soak.steps}",
        f"trainer.save_dir={out}/run",
        f"trainer.save_freq={min(SAVE_FREQ, max(1, soak.steps // 8))}",
        "trainer.keep=2",
        f"trainer.samples_per_step={PROMPTS * RESPONSES}",
        "trainer.load_ckpt_from=latest",
        *(served if soak.engine == "sglang" else []),
    ]


def soak(out: Path, steps: int, warm_up: int, seed: int, engine: str, engine_kills: int, trainer_kills: int) -> Soak:
    """The whole run. Raises RuntimeError if it fails or hangs."""
    seen, begun = Soak(steps, warm_up, seed, engine), time.monotonic()
    rng = random.Random(seed)
    kill_engine = sorted(rng.sample(range(1, steps - 1), engine_kills if engine == "sglang" else 0))
    kill_trainer = sorted(rng.sample(range(1, max(2 + trainer_kills, steps // 10)), trainer_kills))
    out.mkdir(parents=True)
    write_world(out, seed)
    while True:
        trainer = start(out, seen)
        try:
            watch(trainer, out, seen, kill_engine, kill_trainer, rng)
        finally:
            end(trainer)
        if trainer.returncode == 0:
            break
        if len(seen.trainer_kills) < len(seen.lives):  # it was not killed here
            log = out / f"log-{len(seen.lives) - 1}.txt"
            raise RuntimeError(f"the run ended with exit code {trainer.returncode}: {log.read_text()[-3000:]}")
    if kill_engine or kill_trainer:
        raise RuntimeError(f"it ended before the kills at steps {kill_engine + kill_trainer}")
    seen.seconds = time.monotonic() - begun
    check_ledger(out, seen)
    measure_growth(seen)
    return seen


def start(out: Path, seen: Soak) -> subprocess.Popen[bytes]:
    """The next life of the trainer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    log_file = out / f"log-{len(seen.lives)}.txt"
    seen.lives.append(0)
    with log_file.open("wb") as log:
        return subprocess.Popen(command(out, seen), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def watch(
    trainer: subprocess.Popen[bytes],
    out: Path,
    seen: Soak,
    kill_engine: list[int],
    kill_trainer: list[int],
    rng: random.Random,
) -> None:
    """One life of the trainer: measure, and kill what is due, a random while after the step."""
    life, process = len(seen.lives) - 1, psutil.Process(trainer.pid)
    step, moved = -1, time.monotonic()
    while trainer.poll() is None:
        time.sleep(POLL_S)
        seen.lives[life], newest = said(out / f"log-{life}.txt")
        if newest != step:
            step, moved = newest, time.monotonic()
        if time.monotonic() - moved > STILL_S:
            raise RuntimeError(f"no step for {STILL_S} s after step {step}")
        if step < 0:
            continue
        try:
            children = process.children(recursive=True)
            memory = process.memory_info().rss / 2**20, sum(map(resident, children)) / 2**20
        except psutil.NoSuchProcess:
            continue
        seen.curve.append((life, step, round(memory[0], 1), round(memory[1], 1)))
        if kill_engine and step >= kill_engine[0] and (servers := [c for c in children if is_server(c)]):
            time.sleep(rng.uniform(0, 1))  # anywhere in a rollout, a sync of the weights or an update
            rng.choice(servers).kill()
            seen.engine_kills.append(step)
            del kill_engine[0]
        if kill_trainer and step >= kill_trainer[0]:
            time.sleep(rng.uniform(0, 1))
            process.kill()
            trainer.wait()
            seen.trainer_kills.append(step)
            del kill_trainer[0]


def said(log: Path) -> tuple[int, int]:
    """The step that this life of the trainer began with, and its newest one; -1 as long as there is none."""
    text = log.read_text(encoding="utf-8")
    resumed = re.search(r"^resumed from .*: step (\d+)$", text, re.M)
    steps = re.findall(r"^step (\d+)/.*\n", text, re.M)
    return int(resumed[1]) if resumed else 0, int(steps[-1]) if steps else -1


def end(trainer: subprocess.Popen[bytes]) -> None:
    if trainer.poll() is None:
        trainer.terminate()
        trainer.wait()


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def is_server(process: psutil.Process) -> bool:
    try:
        return any(part.endswith("launch.py") for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def check_ledger(out: Path, seen: Soak) -> None:
    """Every row of every epoch once, in the samples that are left and in what the environment was asked."""
    rows = list(lines(out / "run" / "samples.jsonl"))
    by_group: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_group.setdefault((row["step"], row["group"]), []).append(row)
    wanted = [(step, group) for step in range(seen.steps) for group in range(PROMPTS)]
    if lost := sorted(set(wanted) - set(by_group)):
        seen.problems.append(f"{len(lost)} groups are missing, the first is {lost[0]}")
    if odd := sorted(set(by_group) - set(wanted)):
        seen.problems.append(f"{len(odd)} groups are too many, the first is {odd[0]}")
    for place, group in by_group.items():
        if sorted(row["sample"] for row in group) != list(range(RESPONSES)) or len({row["row"] for row in group}) > 1:
            seen.problems.append(f"group {place} is not {RESPONSES} samples of one row")
    drawn = [by_group[place][0]["row"] for place in wanted if place in by_group]
    seen.rows_drawn, seen.epochs = len(drawn), len(drawn) // NUM_ROWS
    for epoch in range(-(-len(drawn) // NUM_ROWS)):
        times = Counter(drawn[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS])
        if twice := [row for row, number in times.items() if number > 1]:
            seen.problems.append(f"epoch {epoch}: {len(twice)} rows were drawn twice, the first is {twice[0]}")
        if epoch < seen.epochs and len(times) < NUM_ROWS:
            seen.problems.append(f"epoch {epoch}: {NUM_ROWS - len(times)} rows were lost")

    # the environment's own book: of a killed life it has calls of steps that were done again
    calls = [line.split() for line in (out / "ledger.txt").read_text().splitlines()]
    seen.faults = dict(Counter(fault for _, _, fault in calls if fault != "none"))
    last = [(int(row), fault) for pid, row, fault in calls if pid == calls[-1][0]]
    left = [row for row in rows if row["step"] >= seen.lives[-1]]
    asked, kept = Counter(row for row, _ in last), Counter(row["row"] for row in left)
    if asked != kept:
        differ = [row for row in asked.keys() | kept.keys() if asked[row] != kept[row]]
        seen.problems.append(f"the environment was asked about {len(differ)} rows another number of times than is kept")
    unscored = Counter(row["row"] for row in left if row["unscored"])
    if forgiven := Counter(row for row, fault in last if fault != "none") - unscored:
        seen.problems.append(f"{forgiven.total()} failed calls have a score")
    if paid := [row for row in rows if row["unscored"] and (row["reward"] or row["score"])]:
        seen.problems.append(f"{len(paid)} unscored trajectories have a reward")
    seen.unscored = sum(bool(row["unscored"]) for row in rows)


def measure_growth(seen: Soak) -> None:
    """Of the last life: the last quarter of what comes after the warm-up, against the first."""
    last = [(step, *memory) for life, step, *memory in seen.curve if life == len(seen.lives) - 1]
    begin = seen.lives[-1] + seen.warm_up
    window = (seen.steps - begin) // 4
    if window < 20:
        return
    for column, name in enumerate(("trainer", "children"), 1):
        first = [row[column] for row in last if begin <= row[0] < begin + window]
        late = [row[column] for row in last if row[0] >= seen.steps - window]
        if statistics.median(first) > 0:
            seen.growth[name] = statistics.median(late) / statistics.median(first) - 1


def lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as text:
        yield from map(json.loads, text)


def draw(seen: Soak, file: Path) -> None:
    """The memory curve; a dashed line is a kill of the trainer, a dot below one of a server."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2))
    for column, name, colour in ((2, "trainer", "#1b6ca8"), (3, "server", "#c9742a")):
        for life in range(len(seen.lives)):
            part = [row for row in seen.curve if row[0] == life]
            label = name if life == len(seen.lives) - 1 else None
            axes.plot([row[1] for row in part], [row[column] for row in part], color=colour, linewidth=0.8, label=label)
    for step in seen.trainer_kills:
        axes.axvline(step, color="#777", linestyle="--", linewidth=0.8)
    axes.plot(seen.engine_kills, [0] * len(seen.engine_kills), "v", color="#c9742a", markersize=4, clip_on=False)
    axes.axvspan(0, seen.lives[-1] + seen.warm_up, color="#000", alpha=0.05, linewidth=0)
    axes.set(xlabel="step", ylabel="resident set, MiB", xlim=(0, seen.steps), ylim=(0, None))
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=200, help="steps before memory counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("sglang", "embedded"), default="sglang")
    parser.add_argument("--engine-kills", type=int, default=20)
    parser.add_argument("--trainer-kills", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a folder that is not there yet")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out} is there already")
    if args.steps < 2 * args.engine_kills or args.steps < 10 * args.trainer_kills:
        parser.error(f"--steps {args.steps} is too few for so many kills")
    seen = soak(
        args.out.resolve(), args.steps, args.warm_up, args.seed, args.engine, args.engine_kills, args.trainer_kills
    )
    if args.json:
        args.json.write_text(json.dumps(asdict(seen)))
    if args.svg:
        draw(seen, args.svg)
    shown = asdict(seen)
    del shown["curve"]
    print(json.dumps(shown | {"step_s": round(seen.seconds / seen.steps, 3), "holds": seen.holds}, indent=1))
    return 0 if seen.holds else 1


if __name__ == "__main__":
    sys.exit(main())
