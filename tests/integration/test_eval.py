"""`rl2 eval` and `rl2 compare` as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from programs import NUM_ROWS, World
from transformers import AutoModelForCausalLM, AutoTokenizer

from RL2.errors import ConfigError
from RL2.tools.eval.evaluate import EvalConfig, compared, evaluate, read, summarise, table
from RL2.tools.settings import parse_settings

SAMPLES = 4
ENVIRONMENT = """
async def step(state, action, extra_info):
    if extra_info["row"] == 3:
        raise RuntimeError("no grade")
    reward = float(any(c.isdigit() for c in action))
    score = max(reward, 0.01)  # partial credit for an answer
    return dict(next_state=None, reward=reward, score=score, done=True, extra_info=extra_info)

def vote(action):
    return next((c for c in action if c.isdigit()), "")
"""


def rl2(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return warm.run("RL2.tools.cli", *arguments, **how)


@pytest.fixture(scope="module")
def settings(world: World) -> list[str]:
    script = world.root / "graded.py"
    script.write_text(ENVIRONMENT)
    common = [f"data={world.root}/rl.jsonl", f"env={script}", f"out={world.root}/evals", "max_new_tokens=12"]
    return [f"model={world.model}", f"samples={SAMPLES}", *common]


def evaluated(settings: list[str]) -> Path:
    done = rl2("eval", *settings)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.rpartition("responses and summary: ")[2].strip())


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(settings: list[str]) -> Path:
    return evaluated(settings)


def test_every_response_is_kept_and_the_summary_is_theirs(folder: Path) -> None:
    kept, summary = records(folder), json.loads((folder / "summary.json").read_text())
    assert [(r["row"], r["sample"]) for r in kept] == [(row, n) for row in range(NUM_ROWS) for n in range(-1, SAMPLES)]
    assert [r["unscored"] is not None for r in kept] == [r["row"] == 3 for r in kept]
    assert summary["unscored"] == 1 + SAMPLES
    greedy = [r["score"] for r in kept if r["sample"] == -1 and r["score"] is not None]
    assert summary["greedy"]["value"] == pytest.approx(sum(greedy) / len(greedy))
    solved = {r["row"] for r in kept if r["sample"] >= 0 and r["reward"]}
    assert summary[f"pass@{SAMPLES}"]["value"] == pytest.approx(len(solved) / (NUM_ROWS - 1))
    assert summary[f"problems@{SAMPLES}"] == NUM_ROWS - 1
    assert summary["maj@2"]["low"] <= summary["maj@2"]["value"] <= summary["maj@2"]["high"]


def test_greedy_tokens_are_those_of_transformers(folder: Path, world: World) -> None:
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(world.model), AutoTokenizer.from_pretrained(world.model)
    rows = [json.loads(line) for line in (world.root / "rl.jsonl").read_text().splitlines()]
    for record in records(folder):
        if record["sample"] == -1:
            prompt = tokenizer.encode(rows[record["row"]]["prompt"], add_special_tokens=False)
            out = lm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
            assert record["token_ids"] == [out[0].tolist()]


def test_what_was_interrupted_goes_on_and_what_is_done_is_read_back(folder: Path, settings: list[str]) -> None:
    whole = (folder / "records.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    last = 7 * (1 + SAMPLES) + 2  # in the middle of a problem, and of a line
    cut = b"".join(lines[:last]) + lines[last][:20]
    (folder / "records.jsonl").write_bytes(cut)
    assert evaluated(settings) == folder
    again = (folder / "records.jsonl").read_bytes()
    assert [json.loads(a) | {"score": 0} for a in again.splitlines()] == [json.loads(a) | {"score": 0} for a in lines]
    began = time.monotonic()
    assert evaluated(settings) == folder
    assert (folder / "records.jsonl").read_bytes() == again
    print(f"read back in {time.monotonic() - began:.1f} s")
    assert evaluated([*settings, "temperature=0.7"]) != folder


@pytest.mark.parametrize("score", [0.01, 0.5, 1.0])
def test_old_records_without_rewards_are_judged_by_the_score_and_it_is_said(score: float, tmp_path: Path) -> None:
    question = EvalConfig(model="m", data="d", env="e", samples=2, greedy=False)
    old = [
        {"row": row, "sample": n, "score": score, "answer": None, "tokens": 3, "truncated": False}
        for row in range(4)
        for n in range(2)
    ]
    for made, right, by_score in ((old, 1.0, 8), ([record | {"reward": 0.0} for record in old], 0.0, None)):
        (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
        summary = summarise(question, read(tmp_path))
        assert summary["pass@2"]["value"] == right
        assert summary.get("judged_by_score") == by_score
        assert ("8 samples of an older version" in str(table(summary).caption)) == (by_score is not None)
    unscored = [record | {"score": None, "reward": None} for record in old]
    assert summarise(question, unscored)["unscored"] == 8
    (tmp_path / "records.jsonl").write_text(json.dumps(old[0] | {"reward": "1"}) + "\n")
    with pytest.raises(ConfigError, match="line 1: not a record of a response: it has no reward"):
        read(tmp_path)


def test_a_text_may_hold_any_character(tmp_path: Path) -> None:
    """Some end a line for Python and not for JSON."""
    kept = {"row": 0, "sample": 0, "score": 1.0, "answer": None, "tokens": 3, "truncated": False}
    record = kept | {"texts": ["a\u2028b\x85c\x1cd\n"]}
    (tmp_path / "records.jsonl").write_text(2 * (json.dumps(record, ensure_ascii=False) + "\n"), encoding="utf-8")
    assert read(tmp_path) == [record, record]


def test_compare_says_what_it_sees(folder: Path, settings: list[str]) -> None:
    same = rl2("compare", f"a={folder}", f"b={folder}")
    assert "b: greedy score" in same.stdout
    assert "against a cannot tell: +0.000" in same.stdout
    other = evaluated([*settings, "seed=1"])
    sampled = rl2("compare", f"a={folder},{other}", f"b={other},{folder}", "--by", "sampled")
    assert f"on {NUM_ROWS - 1} problems, over 2 and 2 runs" in sampled.stdout, sampled.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model=x data=y", "env= is missing"),
        ("model=x data=y env=z sample=3", "'sample' is not a setting"),
        ("model=x data=y env=z samples=-1", "samples=-1; must be"),
        ("model=x data=y env=z greedy=false", "leaves nothing to do"),
        ("model=/nowhere data=y env=z", "model=/nowhere"),
        ("model", "'model' is not a setting"),
    ],
)
def test_mistakes_are_named(settings: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        evaluate(parse_settings(EvalConfig, settings.split()))


@pytest.mark.parametrize(
    ("methods", "by", "said"),
    [
        (["a=x"], "greedy", "nothing to compare with"),
        (["a=x", "b=y"], "greedy", "x has no greedy scores"),
        (["a=x", "b=y"], "best", "choose greedy or sampled"),
    ],
)
def test_what_cannot_be_compared(methods: list[str], by: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compared(methods, by)


AGENT = """
import openai

def play(task):
    client, messages = openai.OpenAI(), [{"role": "user", "content": task["prompt"]}]
    for _ in range(2):
        said = client.chat.completions.create(model="any", messages=messages, max_tokens=6).choices[0].message
        messages += [said, {"role": "user", "content": "Sure?"}]
    return {"reward": float(len(said.content) % 2), "metrics": {"turns": 2}}
"""


def test_an_agent_is_evaluated_as_it_trains(world: World) -> None:
    (world.root / "own_agent.py").write_text(AGENT)
    common = [f"model={world.model}", f"data={world.root}/rl.jsonl", f"out={world.root}/evals", "limit=2", "samples=1"]
    agent = [f"agent={world.root}/own_agent.py:play", "max_turns=2", "max_new_tokens=6"]
    config = parse_settings(EvalConfig, [*common, *agent])
    folder, summary = evaluate(config)
    kept = records(folder)
    assert [(r["row"], r["sample"], r["unscored"]) for r in kept] == [(n, s, None) for n in range(2) for s in (-1, 0)]
    assert {len(r["texts"]) for r in kept} == {4} and {len(r["token_ids"]) for r in kept} == {1}
    assert summary["env/turns"] == 2 and summary["unscored"] == 0
    assert evaluate(config) == (folder, summary)
    with pytest.raises(ConfigError, match="env= is missing"):
        parse_settings(EvalConfig, common)
    with pytest.raises(ConfigError, match="have no effect without agent="):
        parse_settings(EvalConfig, [*common, "env=x.py", "agent_timeout_s=5"])
