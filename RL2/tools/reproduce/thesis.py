"""Reproduction of the thesis at a laptop's scale: every method under several seeds, and a page with verdicts.

Each seed has its own data, model and warm-up; all methods of a seed start from its warm-up. Finished runs are reused
when the command is repeated.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
import transformers

from RL2.io.report import read_metrics
from RL2.tools.eval import evaluate
from RL2.tools.eval.compare import compare
from RL2.tools.jobs import Job, run_jobs
from RL2.tools.reproduce import claims
from RL2.tools.reproduce.claims import Claim, SeedRun
from RL2.tools.reproduce.demo import (
    FULL,
    WARMUP,
    JobBars,
    Method,
    Plan,
    ProgressBoard,
    exam,
    examine,
    find_environment,
    method_job,
    num_cores,
    warmup_job,
    write_plan_data,
)
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import draw_problems, write_demonstrations
from RL2.tools.reproduce.thesis_page import Curve, Part, Row, ThesisPage, write_thesis

SAMPLES = 8

# Learning rates suit each method, as in the demo; methods of one section share one.
DR_GRPO = Method("dr_grpo", "Dr. GRPO", "ppo", 4, ("actor.lr=1e-4",))
SPO_31 = Method("spo_3_1", "SPO 3.1", "spo", 1, ("actor.lr=5e-5",))
SPO_32 = Method("spo_3_2", "SPO 3.2", "spo", 1, ("actor.average_over=kept", "actor.lr=1e-4", "actor.scheduler=linear"))
SPO_33 = Method("spo_3_3", "SPO 3.3", "spo_0p5", 1, ("actor.lr=5e-5",))
SPO_31_PENALTY, SPO_33_PENALTY = (
    replace(
        method,
        name=f"{method.name}_penalty",
        title=f"{method.title}, entropy penalty",
        settings=(*method.settings, "actor.entropy.coef=-0.1"),
    )
    for method in (SPO_31, SPO_33)
)
RANK_JSD = Method("rank_jsd", "rank-JSD", "spo", 1, (*SPO_32.settings, "actor.objective=rank_jsd"))
POSITIVE_CE = Method("positive_ce", "positive CE", "spo", 1, (*SPO_32.settings, "actor.objective=positive_ce"))


@dataclass(frozen=True)
class Section:
    """A section of the thesis and the methods it compares with Dr. GRPO."""

    number: str
    title: str
    lead: str
    methods: tuple[Method, ...]


SECTIONS = (
    Section(
        "3.1",
        "Towards the most likely token",
        "KL divergence between the Bernoulli distributions of the most likely and of the sampled token, on successful "
        "rollouts, divided by the number of all rollouts.",
        (SPO_31,),
    ),
    Section(
        "3.2", "The same, over the successful rollouts", "Divided by the number of successful rollouts.", (SPO_32,)
    ),
    Section("3.3", "A fixed target", "Sampled tokens that are likelier than a half are pulled towards it.", (SPO_33,)),
    Section(
        "4.2",
        "With an entropy penalty",
        "A tenth of the policy's entropy is added to the loss.",
        (SPO_31_PENALTY, SPO_33_PENALTY),
    ),
    Section(
        "4.3",
        "On the order of the tokens",
        "Jensen-Shannon divergence to a target in which the sampled token has the first rank; and cross-entropy on "
        "successful rollouts.",
        (RANK_JSD, POSITIVE_CE),
    ),
)
METHODS: tuple[Method, ...] = (DR_GRPO, *(method for section in SECTIONS for method in section.methods))


@dataclass(frozen=True)
class Pilot:
    """A way to train from scratch on demonstrations (section 4.4); all use the same tokens."""

    name: str
    title: str
    settings: tuple[str, ...]


# cross-entropy is the warm-up itself
RANKS = ("actor.objective=rank_jsd",)
PILOTS = (
    Pilot(WARMUP, "CE", ()),
    Pilot("pilot_rank_jsd", "rank-JSD", RANKS),
    Pilot("pilot_both", "CE + rank-JSD", (*RANKS, "actor.objective_args.ce_coef=1")),
)

ALL: tuple[Method | Pilot, ...] = (*METHODS, *PILOTS)

PUBLISHED_PROBLEMS = 200
PUBLISHED = (
    ("base", 0.815, 0.960),
    ("rank-JSD (beta1 = 0)", 0.935, 0.975),
    ("positive CE", 0.950, 0.980),
    ("Dr. GRPO", 0.945, 0.970),
)
"""Greedy accuracy and pass@8 of Qwen3-4B-Thinking-2507 on held-out problems of GSM8K, one seed each."""


def reproduce(out: Path, num_seeds: int, board: ProgressBoard, plan: Plan = FULL) -> list[Claim]:
    """Train, test and judge everything; write OUT/thesis.html and OUT/thesis.json, and return the judged claims.

    Raise JobError if a run fails; finished runs are reused next time.
    """
    transformers.utils.logging.disable_progress_bar()
    env_path = find_environment()
    homes = [out / f"seed-{seed}" for seed in range(num_seeds)]
    for seed, home in enumerate(homes):
        prepare(home, seed, plan)
    pilots = [pilot_job(pilot, plan, home, seed) for seed, home in enumerate(homes) for pilot in PILOTS]
    run_missing(pilots, board)
    jobs = [
        _titled(method_job(method, plan, home, seed, env_path), seed)
        for seed, home in enumerate(homes)
        for method in METHODS
    ]
    run_missing(jobs, board)

    judged = judge(homes, env_path, board)
    found, asked = list(the_claims(judged)), list(the_questions(judged))
    report = {
        "seeds": num_seeds,
        "claims": [claim._asdict() for claim in found],
        "questions": [claim._asdict() for claim in asked],
        "methods": {name: method.summaries for name, method in judged.items()},
    }
    (out / "thesis.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    commands = [job.shown for job in (*pilots, *jobs) if job.folder.parent == homes[0]]
    seconds = sum(job.seconds for job in (*pilots, *jobs))
    write_thesis(out / "thesis.html", page(judged, found, asked, plan, num_seeds, commands, seconds))
    return found + asked


def prepare(home: Path, seed: int, plan: Plan) -> None:
    """Create data, tokenizer and untrained model of a seed, unless they exist."""
    if (home / "model").is_dir():
        return
    texts = write_plan_data(plan, home, seed)
    held_out = draw_problems(Random(f"{seed} pilot"), plan.test_rows, held_out=True)
    write_demonstrations(home / "data" / "held_out.jsonl", held_out, Random(f"{seed} pilot demonstrator"))
    build_model(home / "new", texts, seed)
    (home / "new").rename(home / "model")


def pilot_job(pilot: Pilot, plan: Plan, home: Path, seed: int) -> Job:
    """Return the job that trains from scratch with the settings of `pilot`."""
    tests = f"data.test_path={home}/data/held_out.jsonl", f"trainer.test_freq={max(1, plan.warmup_steps // 10)}"
    own = pilot.settings
    if own:  # untrained ranks are random, so the rank objective must consider the whole vocabulary
        vocabulary = json.loads((home / "model" / "config.json").read_text())["vocab_size"]
        own = (*own, f"actor.objective_args.rank_cap={vocabulary}")
    job = warmup_job(plan, home, seed, name=pilot.name, settings=(*own, *tests), threads=1)
    return _titled(replace(job, title=f"from scratch, {pilot.title}"), seed)


def _titled(job: Job, seed: int) -> Job:
    return replace(job, title=f"{job.title}, seed {seed}")


def run_missing(jobs: Sequence[Job], board: ProgressBoard) -> None:
    """Run the jobs that are not done."""
    missing = [job for job in jobs if not job.is_done]
    if len(missing) < len(jobs):
        board.say(f"{len(jobs) - len(missing)} of {len(jobs)} runs are already done")
    for job in missing:
        shutil.rmtree(job.folder, ignore_errors=True)  # remains of an interruption
    run_jobs(missing, num_cores(), JobBars(board))


@dataclass(frozen=True)
class Judged:
    """Results of a method under every seed."""

    runs: list[SeedRun]
    summaries: list[dict[str, Any]]
    """Summaries of `rl2 eval` for the model at the end of each run."""


def judge(homes: Sequence[Path], env_path: Path, board: ProgressBoard) -> dict[str, Judged]:
    """Evaluate all models on the held-out problems of their seed, one per core at a time."""
    names = [each.name for each in ALL]
    models = [(seed, name) for seed in range(len(homes)) for name in names]
    exams = {
        (seed, name): exam(
            homes[seed] / name / "latest",
            homes[seed] / "data",
            env_path,
            seed,
            samples=SAMPLES,
            out=homes[seed] / name / "evals",
        )
        for seed, name in models
    }
    title, started = "final test", time.monotonic()
    task = board.start(title, len(models), "models")
    found: dict[tuple[int, str], tuple[dict[str, float], dict[str, Any]]] = {}
    with ProcessPoolExecutor(
        num_cores(), mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        pending = {pool.submit(greedy_scores, config): model for model, config in exams.items()}
        for answer in as_completed(pending):
            found[pending[answer]] = answer.result()
            board.move(task, len(found))
    board.end(task, title, len(models), time.monotonic() - started)
    return {
        name: Judged(
            [
                SeedRun(read_metrics(home / name), found[seed, WARMUP][0], found[seed, name][0])
                for seed, home in enumerate(homes)
            ],
            [found[seed, name][1] for seed in range(len(homes))],
        )
        for name in names
    }


def greedy_scores(config: evaluate.EvalConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluate a model; return problem -> greedy score, and the summary."""
    records, summary = examine(config)
    return evaluate.scores(records, "greedy"), summary


def _runs(judged: dict[str, Judged], method: Method | Pilot) -> list[SeedRun]:
    return judged[method.name].runs


def the_claims(judged: dict[str, Judged]) -> Iterator[Claim]:
    """Yield the claims of the thesis about its methods."""
    runs = partial(_runs, judged)
    for number, method in (("3.1", SPO_31), ("3.2", SPO_32)):
        yield claims.rise_together(number, method.title, runs(method))
        yield claims.loss_grows(number, method.title, runs(method))
        yield claims.fewer_tokens(number, method.title, runs(method), runs(DR_GRPO), DR_GRPO.title)
        yield claims.shorter_answers(number, method.title, runs(method), runs(DR_GRPO), DR_GRPO.title)
    yield claims.rises_then_collapses("3.3", SPO_33.title, runs(SPO_33))


def the_questions(judged: dict[str, Judged]) -> Iterator[Claim]:
    """Yield questions about the later sections, in the form of claims."""
    runs = partial(_runs, judged)
    for method, without in ((SPO_31_PENALTY, SPO_31), (SPO_33_PENALTY, SPO_33)):
        yield claims.lowers_entropy("4.2", method.title, runs(method), runs(without))
    for baseline in (SPO_32, POSITIVE_CE, DR_GRPO):
        yield claims.more_accurate("4.3", RANK_JSD.title, runs(RANK_JSD), runs(baseline), baseline.title)
    for pilot in PILOTS[1:]:
        yield claims.better_likelihood("4.4", pilot.title, runs(pilot), runs(PILOTS[0]), PILOTS[0].title)


def page(
    judged: dict[str, Judged],
    found: list[Claim],
    asked: list[Claim],
    plan: Plan,
    num_seeds: int,
    commands: list[str],
    seconds: float,
) -> ThesisPage:
    """Return the content of the thesis's page."""

    def curve(method: Method | Pilot) -> Curve:
        return Curve(method.name, method.title, [run.metrics for run in _runs(judged, method)])

    def row(method: Method | Pilot, number: str, baseline: Method | Pilot) -> Row:
        against = None
        if method is not baseline:
            first, second = _runs(judged, baseline), _runs(judged, method)
            against = compare([run.after for run in first], [run.after for run in second])
        summaries = judged[method.name].summaries
        return Row(
            number,
            method.title,
            [summary["greedy"]["value"] for summary in summaries],
            [summary["mean"]["value"] for summary in summaries],
            [summary[f"pass@{SAMPLES}"]["value"] for summary in summaries],
            fmean(summary["greedy_length"] for summary in summaries),
            against,
        )

    rows = [row(PILOTS[0], "", PILOTS[0]), row(DR_GRPO, "", DR_GRPO)]
    rows[0] = replace(rows[0], title="warm-up, where all start")
    rows += [row(method, section.number, DR_GRPO) for section in SECTIONS for method in section.methods]
    return ThesisPage(
        claims=found,
        questions=asked,
        rows=rows,
        baseline=DR_GRPO.title,
        parts=[
            Part(section.number, section.title, section.lead, [curve(DR_GRPO), *map(curve, section.methods)])
            for section in SECTIONS
        ],
        pilots=[curve(pilot) for pilot in PILOTS],
        pilot_rows=[row(pilot, "4.4", PILOTS[0]) for pilot in PILOTS],
        published=list(PUBLISHED),
        published_problems=PUBLISHED_PROBLEMS,
        samples=SAMPLES,
        settings={
            "seeds": f"{num_seeds}, each with data, model and warm-up of its own",
            "model": "245,000 parameters in Qwen3's architecture",
            "from scratch": f"{plan.warmup_steps} steps of {plan.warmup_batch} careless demonstrations",
            "Dr. GRPO": "reward minus the group's mean; the loss is averaged over tokens",
            "on rewards": f"{plan.steps} steps of {plan.sequences_per_step} responses",
            "tests": f"{plan.test_rows} held-out problems of each seed",
            "time": f"{seconds / 60:.0f} minutes of runs, {num_cores()} of them side by side on as many cores "
            f"({platform.machine()})",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        },
        reproduce=f"rl2 reproduce thesis --seeds {num_seeds}",
        commands=commands,
    )


GPU_COMMON = (
    "train_data.path=train@openai/gsm8k:main",
    "test_data.path=test@openai/gsm8k:main",
    "actor.model_name=Qwen/Qwen3-4B-Thinking-2507",
    "actor.max_length_per_device=8576",
    "rollout.env_path=envs/gsm8k.py",
    "rollout.train_sampling_params.max_new_tokens=8192",
    "trainer.project=thesis",
    "trainer.n_epochs=150",
    "trainer.test_freq=5",
    "trainer.save_freq=20",
)
GPU_PILOT = (
    "data.path=train@openai/gsm8k:main",
    "data.env_path=envs/gsm8k.py",
    "data.max_length=1024",
    "data.batch_size=64",
    "data.test_ratio=0.05",
    "actor.model_name=Qwen/Qwen3-4B-Base",
    "actor.max_length_per_device=16384",
    "trainer.project=thesis",
    "trainer.n_epochs=3",
    "trainer.test_freq=20",
)
RESPONSES_AT_ONCE = 512


def gpu_commands(num_seeds: int, nproc: int) -> Iterator[str]:
    """Yield shell commands that repeat the thesis on Qwen3-4B with `nproc` GPUs: train, evaluate, compare."""
    launcher = ["torchrun", f"--nproc_per_node={nproc}", "-m"]
    folders: dict[str, list[str]] = {}
    for seed in range(num_seeds):
        for method in ALL:
            name = "pilot_ce" if method.name == WARMUP else method.name
            folder = f"ckpts/thesis/{name}-{seed}"
            # learning rates and schedules of the tiny model do not transfer; the programs' defaults suit this one
            own = [s for s in method.settings if not s.startswith(("actor.lr=", "actor.scheduler="))]
            if isinstance(method, Method):
                number = method.responses_per_prompt
                data = [f"train_data.prompts_per_rollout={RESPONSES_AT_ONCE // number}"]
                own = [*GPU_COMMON, *data, f"train_data.responses_per_prompt={number}", *own]
                folders.setdefault(name, []).append(folder)
            else:
                own = [*GPU_PILOT, *own]
            program = f"RL2.trainer.{method.program if isinstance(method, Method) else 'sft'}"
            trainer = [f"trainer.experiment_name={name}-{seed}", f"trainer.save_dir={folder}", f"trainer.seed={seed}"]
            yield shlex.join([*launcher, program, *own, *trainer])
    for folder in (folder for paths in folders.values() for folder in paths):
        ask = [f"model={folder}/latest", "data=test@openai/gsm8k:main", "env=envs/gsm8k.py", f"samples={SAMPLES}"]
        yield shlex.join(["rl2", "eval", *ask, "max_new_tokens=8192", f"out={folder}/evals"])
    evals = {name: ",".join(f"$(echo {path}/evals/*)" for path in paths) for name, paths in folders.items()}
    yield " ".join(["rl2 compare", *(f"{name}={paths}" for name, paths in evals.items())])
