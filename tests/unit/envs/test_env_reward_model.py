"""`envs/reward_model.py` judges step by step with a model that classifies tokens, and never an unclosed thought."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from RL2.config.scripts import ScriptError
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.step_result import StepResult, Unscored

SCRIPT = Path(__file__).parents[3] / "envs" / "reward_model.py"
Load = Callable[..., tuple[PreTrainedModel, Environment]]


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """A tiny random model of a kind, and the environment that asks it."""
    loaded: list[Environment] = []

    def load(kind: type[PreTrainedModel], num_labels: int = 2, **variables: str) -> tuple[PreTrainedModel, Environment]:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        more = {"vocab_size": len(tokenizer), "num_labels": num_labels, "pad_token_id": 0, "initializer_range": 0.3}
        model = kind(LlamaConfig(**shape, **more)).eval()  # large weights: values that differ
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        monkeypatch.setenv("REWARD_MODEL", str(tmp_path / "model"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        loaded.append(load_environment(SCRIPT, 60))
        return model, loaded[-1]

    yield load
    for environment in loaded:
        environment.close()


def judge(environment: Environment, action: str, state: str = "How many?") -> StepResult:
    return asyncio.run(environment.step(state, action, {}))


def written_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: str, steps: list[str], separator: str
) -> list[float]:
    """The probability of the second label behind each step, read one after the other, as TRL tokenizes them."""
    token_ids = tokenizer.encode(state, add_special_tokens=False)
    values = []
    for step in steps:
        for text in (step, separator):
            token_ids = token_ids + tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([token_ids])).logits[0, -1]
        values.append(float(logits.softmax(-1)[1]))
    return values


ACTION = "First, 12+30=42.\n\n  Then 42 apples.  \n\n\n\n#### 42"
STEPS = ["First, 12+30=42.", "Then 42 apples.", "#### 42"]


@pytest.mark.parametrize("how", ["mean", "gain", "sum"])
def test_each_step_is_judged_where_it_ends(how: str, load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    model, environment = load(LlamaForTokenClassification, REWARD_STEPS=how)
    found = judge(environment, ACTION)
    values = written_out(model, tokenizer, "How many?", STEPS, "\n\n")
    assert max(values) - min(values) > 0.01
    rewards = {
        "mean": [value / 3 for value in values],
        "gain": [values[0], values[1] - values[0], values[2] - values[1]],
        "sum": values,
    }[how]
    assert [span.reward for span in found.spans] == pytest.approx(rewards, abs=1e-5)
    assert [ACTION[: span.end].endswith(step) for span, step in zip(found.spans, STEPS, strict=True)] == [True] * 3
    assert found.reward == 0
    totals = {"mean": math.fsum(values) / 3, "gain": values[-1], "sum": math.fsum(values)}
    assert found.total == pytest.approx(totals[how], abs=1e-5)
    assert found.score == pytest.approx(math.fsum(values) / 3, abs=1e-5)


def test_steps_may_be_lines(load: Load, tokenizer: PreTrainedTokenizerBase) -> None:
    model, environment = load(LlamaForTokenClassification, REWARD_STEP="\\n", REWARD_STEPS="sum")
    found = judge(environment, "12+30=42\n48-19=29")
    values = written_out(model, tokenizer, "How many?", ["12+30=42", "48-19=29"], "\n")
    assert [span.reward for span in found.spans] == pytest.approx(values, abs=1e-5)


def test_no_text_is_lost_or_judged_twice(load: Load) -> None:
    _, environment = load(LlamaForTokenClassification, num_labels=1)
    rng = Random(0)
    for _ in range(20):
        action = "".join(rng.choice(["\n", "\n\n", " ", "42", "é", "😀"]) for _ in range(rng.randrange(9)))
        found = judge(environment, action)
        pieces = [piece.strip() for piece in action.split("\n\n") if piece.strip()]
        ends = [span.end for span in found.spans]
        assert [action[:end].endswith(piece) for end, piece in zip(ends, pieces, strict=True)] == [True] * len(pieces)
        assert ends == sorted(set(ends))
        assert (found.total == 0) == (not pieces)


UNCLOSED = [("<think>12+30", "How many?"), ("12+30", "How many?<think>\n"), ("a</think>b <think>c", "How many?")]


@pytest.mark.parametrize(("action", "state"), UNCLOSED)
def test_reasoning_that_is_never_closed_is_not_judged(action: str, state: str, load: Load) -> None:
    """A probability of 0 is the least there is; a value of 0 may be more than others earn."""
    _, environment = load(LlamaForTokenClassification)
    found = judge(environment, action, state)
    assert (found.total, found.score, found.spans) == (0, 0, ())
    for kind in (LlamaForSequenceClassification, LlamaForTokenClassification):
        _, environment = load(kind, num_labels=1)
        with pytest.raises(Unscored, match="never closes its reasoning: there is no answer to judge"):
            judge(environment, action, state)
        assert judge(environment, "<think>12+30</think>42", "How many?").total


@pytest.mark.parametrize(
    ("num_labels", "variables", "message"),
    [
        (3, {}, "has 3 labels; a process reward model has one or two"),
        (2, {"REWARD_STEPS": "max"}, "REWARD_STEPS=max; choose mean, gain or sum"),
        (2, {"REWARD_STEP": ""}, "REWARD_STEP is empty"),
    ],
)
def test_what_cannot_work_is_said_at_the_start(
    num_labels: int, variables: dict[str, str], message: str, load: Load
) -> None:
    with pytest.raises(ScriptError, match=message):
        load(LlamaForTokenClassification, num_labels, **variables)
