"""What runs and evaluations have written, damaged: commands name the file, or read it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import clear, inputs, mangled, shaken
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_settings import needed

from RL2.config.load import load, show
from RL2.io.report import TOKENS, Report, read_metrics
from RL2.tools.eval.evaluate import RECORDS, EvalConfig, compared, keep_whole_problems, read, summarise, table
from RL2.tools.replay import read_batch, run_config
from RL2.tools.view.run_index import RunIndex
from RL2.types import Sequence, Trajectory

RECORD = {"row": 0, "sample": -1, "score": 1.0, "answer": "7", "tokens": 3, "truncated": False, "unscored": None}
RECORD |= {"token_ids": [[1, 2, 3]], "texts": ["3 + 4 =", "7"]}
METRICS = [{"step": n, "train/score": n / 4, "test/score": 0.5} for n in range(3)]
SAMPLE = {"step": 0, "split": "train", "row": 3, "group": 0, "sample": 0, "texts": ["a", "b"], "reward": 1.0}
SAMPLE |= {"score": 1.0, "truncated": False, "unscored": None, "num_tokens": 2}
REPLAY = {
    "step": 0,
    "objectives": [
        {"title": "spo", "loss": 0.1, "norm": 1.0, "tokens": 2, "entropy": 0.1, "correct": 0.2, "wrong": math.nan}
        | {"weight_N": [0.5, 1.5]}
    ],
    "cosines": [{"of": "spo", "and": "spo", "cosine": 1.0}],
}
BATCH = {
    "token_ids_T": torch.tensor([1, 2]),
    "labels_T": torch.tensor([2, 3]),
    "cu_seqlens": torch.tensor([0, 2]),
    "action_T": torch.tensor([True, True]),
}


def as_lines(rows: Any) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    try:
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    except (ValueError, RecursionError):
        return b"[\n"


def records(rows: list[Any]) -> st.SearchStrategy[bytes]:
    return mangled(as_lines(rows)) | shaken(rows).map(as_lines)


def test_evaluations(tmp_path: Path) -> None:
    rows = [
        RECORD | {"row": row, "sample": sample, "score": (row + sample) % 2} for row in (0, 1) for sample in (-1, 0)
    ]
    (whole := tmp_path / "whole").mkdir()
    (whole / RECORDS).write_bytes(as_lines(rows))
    (folder := tmp_path / "fuzzed").mkdir()
    question = EvalConfig(model="m", data="d", env="e", samples=1)

    @inputs(0.04)
    @given(records(rows))
    def use(data: bytes) -> None:
        (folder / RECORDS).write_bytes(data)
        with clear():
            table(summarise(question, read(folder)))
            compared([f"a={whole}", f"b={folder}"], "greedy")
        with clear():
            compared([f"a={whole}", f"b={folder}"], "sampled")
        with clear():
            keep_whole_problems(folder, 2)
            read(folder)

    use()


def run_folder(folder: Path) -> Path:
    """As a run leaves it, with one rollout looked at token by token and replayed."""
    folder.mkdir()
    (folder / "config.yaml").write_text(show(load("spo", needed("spo"))))
    (folder / "metrics.jsonl").write_bytes(as_lines(METRICS))
    (folder / "samples.jsonl").write_bytes(as_lines([SAMPLE]))
    trajectory = Trajectory(row=3, group=0, sample=0)
    trajectory.sequences = [Sequence([1, 2, 3], [False, True, True], [0.0, -1.0, -2.0], [0.0, 0.0, 1.0])]
    row = {"row": 3, "group": 0, "sample": 0, "length": 2, "reward": 1.0, "score": 1.0, "loss": 0.5}
    row |= {"token_ids": [1, 2, 3], "tokens": ["a", "b", "c"], "sampled": [False, True, True], "rank": [0, 1]}
    row |= {name: [-1.0, -2.0] for name in ("logp", "max_logp", "entropy", "engine_logp", "loss_T", "pull_T")}
    row |= {"top": [["b"], ["c"]], "top_logp": [[-0.5], [-0.5]]}
    Report(folder, True, 1).tokens(0, "train", [row])
    (folder / "replay_000000").mkdir()
    (folder / "replay_000000" / "replay.json").write_text(json.dumps(REPLAY))
    save_file(BATCH, folder / "replay_000000" / "batch.safetensors")
    return folder


TOKEN_FILE = f"{TOKENS}/000000_train.parquet"


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("metrics.jsonl", 0.02),
        ("samples.jsonl", 0.02),
        ("config.yaml", 0.01),
        (TOKEN_FILE, 0.01),
        ("replay_000000/replay.json", 0.01),
        ("replay_000000/batch.safetensors", 0.01),
    ],
)
def test_pages(name: str, share: float, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    valid = (folder / name).read_bytes()
    strategies: dict[str, Callable[[], st.SearchStrategy[bytes]]] = {
        "metrics.jsonl": lambda: records(METRICS),
        "samples.jsonl": lambda: records([SAMPLE]),
        "replay_000000/replay.json": lambda: records([REPLAY]),
    }

    @inputs(share)
    @given(strategies.get(name, lambda: mangled(valid))())
    def use(data: bytes) -> None:
        (folder / name).write_bytes(data)
        with clear():
            for _ in RunIndex([str(folder)]).chunks():
                pass
        if name == "metrics.jsonl":
            with clear():
                assert all(isinstance(row["step"], int) for row in read_metrics(folder))
            with clear():
                Report(folder, True, 3).keep_before(1)
        if name == "config.yaml":
            with clear():
                run_config(folder, folder / "replay_000000", "spo actor.path.detach_target=true")
        if name.endswith("batch.safetensors"):
            with clear():
                read_batch(folder / name)

    use()
    (folder / name).write_bytes(valid)
    assert len(list(RunIndex([str(folder)]).chunks())) == 3  # and as it was, all of it is read


@inputs(0.01)
@given(
    st.text(max_size=12) | st.sampled_from(["spo 'x", "spo actor=1", "spo =", "ppo actor.clip=[", "", "spo a.b.c=1"])
)
def test_titles_of_replays(tmp_path_factory: pytest.TempPathFactory, title: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "titles"
    if not folder.exists():
        run_folder(folder)
    with clear():
        run_config(folder, folder / "replay_000000", title)
