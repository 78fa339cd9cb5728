"""Runs as `rl2 view` finds them, written by the library's own report, with made-up contents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import torch

from RL2.batch.packing import pack
from RL2.io.report import Report
from RL2.tools.replay import Replay, Replayed, save
from RL2.trainer.run import REPLAY_BATCH, replay_folder
from RL2.types import Sequence, Trajectory

HOSTILE = "</script><script>window.owned = 1</script><img src=x onerror='window.owned = 2'>"
WORDS = ["four", " plus", " five", " is", " nine", "\n", " apples", " so", " therefore", " #### 9", "."]


def trajectory(row: int, sample: int, text: str, reward: float, length: int) -> Trajectory:
    sequence = Sequence(
        [0] * (length + 2), [False, False] + [True] * length, [0.0] * (length + 2), [0.0] * (length + 1) + [reward]
    )
    texts = [f"Question {row}?", text]
    return Trajectory(row, group=row, sample=sample, sequences=[sequence], texts=texts, score=reward)


def token_row(of: Trajectory, step: int, rng: Random, *, trains: bool) -> dict[str, Any]:
    """Statistics that could be: at the first token the second-most likely one was taken, elsewhere the first."""
    length = of.num_tokens
    tops = [sorted((rng.uniform(0.01, 0.3) for _ in range(5)), reverse=True) for _ in range(length)]
    taken = [1] + [0] * (length - 1)
    said = [WORDS[(step + k) % len(WORDS)] for k in range(length)]
    others = [[f" other{j}" for j in range(5)] for _ in range(length)]
    for k, place in enumerate(taken):
        others[k][place] = said[k]
    logp = [math.log(top[place]) for top, place in zip(tops, taken, strict=True)]
    return {
        "row": of.row,
        "group": of.group,
        "sample": of.sample,
        "reward": of.reward,
        "score": of.score,
        "length": length,
        "loss": 0.25 * (step + 1) + of.row if trains else None,
        "token_ids": of.sequences[0].token_ids.tolist(),
        "tokens": ["Question", f" {of.row}?", *said],
        "sampled": of.sequences[0].action_mask.tolist(),
        "logp": logp,
        "max_logp": [math.log(top[0]) for top in tops],
        "rank": [place + 1 for place in taken],
        "entropy": [rng.uniform(0, 2) for _ in range(length)],
        "engine_logp": [value + 1e-6 for value in logp],
        "top": others,
        "top_logp": [[math.log(p) for p in top] for top in tops],
    } | (
        {"loss_T": [0.1 * k for k in range(length)], "pull_T": [0.1 - 0.02 * k for k in range(length)]}
        if trains
        else {}
    )


def write_run(folder: Path, *, seed: int, objective: str, steps: int = 4, rows: int = 6, hostile: bool = False) -> None:
    """`rows` rollouts of each split at each step; tokens at the even steps; the response of row r has r + 3 tokens."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"actor: {{objective: {objective}}}\ntrainer: {{seed: {seed}, save_dir: {folder}}}\n"
    )
    rng, report = Random(seed), Report(folder, is_first=True, num_steps=steps)
    answer = f"answer {seed}" + hostile * HOSTILE
    report.first_rows({"name": f"row {n}", "pieces": [(f"Question {n}?", False), (answer, True)]} for n in range(1, 6))
    for step in range(steps):
        write_step(report, step, rng, rows=rows, hostile=hostile)


def write_replay(folder: Path, step: int, *, rows: int = 6) -> None:
    """Of the rollouts of a step: `spo` pulls at the first token alone, `sft` at all alike."""
    kept = replay_folder(folder, step)
    kept.mkdir()
    batch = pack([trajectory(row, 0, "", 0.0, row + 3) for row in range(rows)])
    batch.save(kept / REPLAY_BATCH)
    lengths = [row + 3 for row in range(rows)]
    weights = {
        "spo": torch.tensor([float(k == 0) for length in lengths for k in range(length)]),
        "sft": torch.full((sum(lengths),), 0.5),
    }
    figures = {"loss": 0.25, "norm": 2.0, "tokens": sum(lengths), "entropy": 0.125, "correct": 1.5, "wrong": math.nan}
    found = [Replayed(title, **figures, weight_N=weight_N) for title, weight_N in weights.items()]
    save(Replay(step, found, {("spo", "sft"): 0.75, ("spo", "spo"): 1.0, ("sft", "sft"): 1.0}), kept / "replay.json")


def write_credit(folder: Path, step: int, *, rows: int = 6) -> None:
    """Credit of the rollouts of a step: the first token decided, and the alternative to it is hostile text."""
    kept = replay_folder(folder, step)
    kept.mkdir(exist_ok=True)
    answers = []
    for row in range(rows):
        length, reward = row + 3, float((row + step) % 2)
        after = 0.75 if reward else 0.25
        other = {"at": 0, "text": HOSTILE, "advantage": [-0.2, -0.3, -0.1], "number": 40}
        other["examples"] = [{"text": f" instead {HOSTILE}", "reward": 0.0}]
        answers.append(
            {
                "row": row,
                "sample": 0,
                "group": row,
                "reward": reward,
                "token_ids": trajectory(row, 0, "", 0.0, length).sequences[0].token_ids.tolist(),
                "value": [[0.5, 0.4, 0.6], *[[after, after - 0.1, after + 0.1]] * (length - 1), [reward] * 3],
                "number": [100] * (length + 1),
                "advantage": [[after - 0.5, after - 0.7, after - 0.3], *[[0.0, -0.05, 0.05]] * (length - 1)],
                "alternatives": [other],
                "pulls": {"spo": [0.5] + [0.0] * (length - 1), "sft": [0.1] * length},
            }
        )
    agreement = [
        {"title": "sft", "rank": [0.0, -0.2, 0.2], "signed": None, "share": [0.3, 0.2, 0.4], "random": 0.25},
        {"title": "spo", "rank": [0.9, 0.8, 1.0], "signed": [0.5, 0.4, 0.6], "share": None, "random": 0.25},
    ]
    credit = {"step": step, "rewards": [0.0, 1.0], "answers": answers, "agreement": agreement}
    (kept / "credit.json").write_text(json.dumps(credit))


def write_step(report: Report, step: int, rng: Random, *, rows: int = 6, hostile: bool = False) -> None:
    for split in ("test", "train"):
        found = []
        for row in range(rows):
            text = f"answer {row} of step {step} {split}" + (f" {HOSTILE}" if hostile else "")
            found.append(trajectory(row, 0, text, float((row + step) % 2), row + 3))
        if hostile:
            found[0].unscored = HOSTILE
            found[1].parts = {HOSTILE: 0.25}
        report.samples(step, split, found)
        if step % 2 == 0:
            tokens = [token_row(one, step, rng, trains=split == "train") for one in found]
            if hostile:
                for row in tokens:
                    row["tokens"][-1] = row["top"][0][0] = HOSTILE
            report.tokens(step, split, tokens)
    scores = {"train/score": rng.random(), "train/length": 5.5, "actor/loss": 0.5 / (step + 1), "time/step_s": 1.0}
    report.step(step, scores | ({"test/score": rng.random()} if step % 2 == 0 else {}))
