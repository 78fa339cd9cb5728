"""Episodes of several roles: each role's tokens are kept as sampled, and those of an opponent never train."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.agents.roles import Opponent, RolePlayer
from RL2.agents.session import Policy
from RL2.batch.packing import pack
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.metrics import drop_equal_groups, rollout_metrics
from RL2.rollout.roles import by_role
from RL2.types import Prompt, Sampling, Sequence, Trajectory

GAME = """
ROLES = {"a": "You are a.", "b": "You are b.", "judge": ""}
async def play(ask, task):
    said = task["prompt"]
    for role in ("a", "b", "a"):
        said = await ask(role, said)
    verdict = await ask("judge", [{"role": "user", "content": said}])
    return {"rewards": {"a": 1, "b": -1, "judge": 0.5}, "metrics": {"words": len(verdict.split())}}
"""
Play = Callable[..., Trajectory]


@pytest.fixture
def play(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Play]:
    """One episode of a script, the policy with one engine and opponents with others."""
    environments: list[Environment] = []

    def make(
        engine: ScriptedEngine, source: str = GAME, max_turns: int = 4, weights: Any = None, **others: ScriptedEngine
    ) -> Trajectory:
        path = tmp_path / "game.py"
        path.write_text(source)
        environments.append(load_environment(path, 20, weights, with_roles=True))
        opponents = {role: Opponent(answering(tokenizer, each), (2,)) for role, each in others.items()}
        player = RolePlayer(answering(tokenizer, engine), opponents)
        prompt = Prompt(3, "Is it?", tokenizer.encode("Is it?"), {}, {}, [{"role": "user", "content": "Is it?"}])
        sampling = Sampling(64, stop_token_ids=(2,))
        how: dict[str, Any] = {"sampling": sampling, "max_turns": max_turns, "group": 5, "sample": 1, "seed": 0}
        return asyncio.run(player.play(prompt, environment=environments[-1], **how))

    yield make
    for environment in environments:
        environment.close()


def answering(tokenizer: PreTrainedTokenizerBase, engine: ScriptedEngine) -> Policy:
    template = Template(tokenizer)
    return Policy(engine, tokenizer, template, ResponseParser(template), 400)


def says(tokenizer: PreTrainedTokenizerBase, *texts: str) -> ScriptedEngine:
    left = iter(texts)
    return ScriptedEngine(lambda token_ids, sampling: [*tokenizer.encode(next(left)), tokenizer.eos_token_id])


def sampled(sequences: list[Sequence]) -> list[list[int]]:
    return [[i for i, own in zip(s.token_ids.tolist(), s.action_mask.tolist(), strict=True) if own] for s in sequences]


def test_each_role_has_a_conversation_of_its_own(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "many"]
    assert tokenizer.encode("many") != letters, "the tokenizer spells this otherwise"
    replies = iter([[*letters, 2], *([*tokenizer.encode(text), 2] for text in ("no", "well", "I judge"))])
    engine = ScriptedEngine(lambda token_ids, sampling: next(replies))
    trajectory = play(engine)
    of_a, of_b, of_judge = trajectory.sequences
    assert [sequence.role for sequence in trajectory.sequences] == ["a", "b", "judge"]
    assert tokenizer.decode(of_a.token_ids.tolist()) == (
        "<|im_start|>system\nYou are a.<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
        "many<|im_end|>\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\nwell<|im_end|>"
    )
    assert sampled([of_a]) == [[*letters, 2, *tokenizer.encode("well"), 2]], "sampled ids are not encoded again"
    assert tokenizer.decode(of_b.token_ids.tolist()).endswith(
        "user\nmany<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    )
    assert tokenizer.decode(of_judge.token_ids.tolist()).startswith("<|im_start|>user\nwell"), (
        "no system prompt, no history"
    )
    # the engine read exactly the tokens before each response
    read = [token_ids for token_ids, _ in engine.requests]
    assert read[0] == of_a.token_ids.tolist()[: len(read[0])] and read[2] == of_a.token_ids.tolist()[: len(read[2])]
    assert read[1] == of_b.token_ids.tolist()[: len(read[1])] and read[3] == of_judge.token_ids.tolist()[: len(read[3])]
    assert trajectory.speakers == ["a", "b", "a", "judge"]
    assert trajectory.texts[1::2] == ["many", "no", "well", "I judge"]
    assert trajectory.parts == {"a": 1, "b": -1, "judge": 0.5}
    assert (trajectory.reward, trajectory.score) == (0.5, pytest.approx(0.5 / 3))
    assert trajectory.metrics == {"words": 2}


def test_tokens_of_an_opponent_never_train(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    mine, other, judge = (
        says(tokenizer, "yes", "indeed"),
        says(tokenizer, "nothing"),
        says(tokenizer, "I judge"),
    )
    trajectory = play(mine, b=other, judge=judge)
    assert [len(engine.requests) for engine in (mine, other, judge)] == [2, 1, 1]
    (of_a,) = trajectory.sequences
    assert of_a.role == "a"
    assert sampled([of_a]) == [[*tokenizer.encode("yes"), 2, *tokenizer.encode("indeed"), 2]]
    heard = tokenizer.encode("nothing")
    start = next(i for i in range(len(of_a.token_ids)) if of_a.token_ids.tolist()[i : i + len(heard)] == heard)
    assert not any(of_a.action_mask[start : start + len(heard)]), "it reads the opponent's words as observations"
    assert of_a.versions[start] == -1
    assert trajectory.texts[1::2] == ["yes", "nothing", "indeed", "I judge"], "all turns can be read"
    assert trajectory.parts == {"a": 1}
    parts = by_role([trajectory])
    assert [(part.role, len(part.sequences), part.reward) for part in parts] == [
        ("a", 1, 1),
        ("b", 0, 0),
        ("judge", 0, 0),
    ]
    assert parts[1].texts[1::2] == ["nothing"]
    batch = pack([part for part in parts if part.sequences])
    trained = batch.labels_T[batch.action_T].tolist()
    assert trained == sampled([of_a])[0]


def test_each_role_has_the_reward_and_group_of_its_own(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    trajectory = play(says(tokenizer, "x", "y", "z", "w"), weights={"b": 2.0})
    assert trajectory.reward == 1 - 2 + 0.5
    parts = by_role([trajectory])
    assert [(part.role, part.reward) for part in parts] == [("a", 1), ("b", -2), ("judge", 0.5)]
    assert {(part.group, part.sample, part.row) for part in parts} == {(5, 1, 3)}
    assert [part.texts[1::2] for part in parts] == [["x", "z"], ["y"], ["w"]]
    batch = pack(parts)
    assert batch.role_B is not None
    assert batch.role_B.tolist() == [0, 1, 2]
    assert len(set(batch.group_B.tolist())) == 3
    assert batch.trajectory_B.tolist() == [0, 1, 2]
    metrics = rollout_metrics([trajectory], "train")
    assert (metrics["train/reward/a"], metrics["train/reward/b"], metrics["train/turns"]) == (1, -1, 4)
    assert metrics["train/length/a"] == 4 and metrics["train/length/judge"] == 2


def test_a_rollout_without_roles_is_as_it_was() -> None:
    alone = Trajectory(0, 4, 0, [Sequence([1, 2], [False, True], [0.0, -1.0], [0.0, 1.0])])
    assert by_role([alone]) == [alone] and by_role([alone])[0] is alone
    batch = pack([alone])
    assert batch.role_B is None and batch.group_B.tolist() == [4]


def test_filters_compare_a_role_with_itself() -> None:
    def part(role: str, reward: float) -> Trajectory:
        return Trajectory(0, 0, 0, [Sequence([1, 2], [False, True], [0.0, -1.0], [0.0, reward])], role=role)

    parts = [part("a", 1), part("b", -1), part("a", 1), part("b", 0)]
    assert [each.role for each in drop_equal_groups(parts)] == ["b", "b"]


def test_roles_draw_different_tokens_for_the_same_words(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    source = """
import asyncio
ROLES = ("a", "b")
async def play(ask, task):
    said = await asyncio.gather(ask("a", "go"), ask("b", "go"), ask("a", [{"role": "user", "content": "go"}]))
    return {"rewards": {"a": 1, "b": 1}}
"""
    engine = says(tokenizer, "x", "x", "x")
    play(engine, source)
    seeds = [sampling.seed for _, sampling in engine.requests]
    assert len(set(seeds)) == 3
    again = says(tokenizer, "x", "x", "x")
    play(again, source)
    assert sorted(sampling.seed for _, sampling in again.requests) == sorted(seeds)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("return {'rewards': {'a': 1}}", "the policy was asked for no response"),
        (
            "await ask('a', 'x'); await ask('b', 'x'); return {'rewards': {'a': 1}}",
            "there is no reward of b, which the",
        ),
        ("[await ask('a', 'x') for n in range(5)]", "role a: the episode has had rollout.max_turns=4 responses"),
        ("await ask('a', 'x ' * 900)", "role a: the prompt has .* tokens, which leaves no room"),
        ("await asyncio.gather(ask('a', 'x'), ask('a', 'y'))", r"ask\('a', ...\) before its last response is there"),
    ],
)
def test_what_cannot_be_scored_is_unscored(
    play: Play, tokenizer: PreTrainedTokenizerBase, body: str, cause: str
) -> None:
    import re

    source = f"import asyncio\nROLES = ('a', 'b')\nasync def play(ask, task):\n    {body}\n"
    trajectory = play(says(tokenizer, *["x"] * 9), source)
    assert trajectory.unscored is not None
    assert re.search(cause, trajectory.unscored), trajectory.unscored
    assert not any(any(sequence.rewards) for sequence in trajectory.sequences)


def test_an_error_of_an_opponents_engine_is_raised(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    def fails(token_ids: list[int], sampling: Sampling) -> list[int]:
        raise ConnectionError("the engine is gone")

    with pytest.raises(ConnectionError, match="the engine is gone"):
        play(says(tokenizer, "x", "y"), b=ScriptedEngine(fails))
