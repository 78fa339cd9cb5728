"""Rewards for pieces of a response stand at the very tokens that complete them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from episodes import one_episode
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from RL2.batch.advantages import gae, reinforce
from RL2.batch.packing import pack
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.continuation import decode
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.spans import last_tokens
from RL2.types import Prompt, Sampling, Trajectory

SCRIPT = """
async def step(state, action, extra_info):
    reward, spans = eval(extra_info["reward"]), eval(extra_info["spans"])
    return {"next_state": state + action, "reward": reward, "score": 0, "done": True, "extra_info": extra_info,
            "spans": spans, "train": extra_info.get("train", True)}
"""


def numbers_of_bytes(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[int]:
    """Bytes of each token of a byte-level tokenizer, which writes a byte as one character."""
    return [len(token) for token in tokenizer.convert_ids_to_tokens(token_ids)]


def written_out(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], text: str) -> list[int]:
    """For each number of characters from 1, the token with its last byte."""
    ends = [sum(numbers_of_bytes(tokenizer, token_ids)[: n + 1]) for n in range(len(token_ids))]
    assert ends[-1] == len(text.encode())
    found = []
    for number in range(1, len(text) + 1):
        size = len(text[:number].encode())
        found.append(next(n for n, end in enumerate(ends) if end >= size))
    return found


ALPHABET = "ab 12+=#.\n\té€😀汉\N{REPLACEMENT CHARACTER}\N{COMBINING ACUTE ACCENT}"


@pytest.mark.parametrize("seed", range(20))
def test_every_character_of_every_text_has_its_token(seed: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Texts whose characters take one to four tokens, in the tokenizer's own spelling and byte by byte."""
    rng = Random(seed)
    text = "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 40))) + "12+30=42 apples"
    spelled = tokenizer.encode(text, add_special_tokens=False)
    by_byte = [token for character in text for token in single(tokenizer, character)]
    for token_ids in (spelled, by_byte):
        found = last_tokens(partial(decode, tokenizer), token_ids, range(1, len(text) + 1))
        assert found == written_out(tokenizer, token_ids, text)
    assert len(by_byte) == len(text.encode())


def single(tokenizer: PreTrainedTokenizerBase, character: str) -> list[int]:
    """One token for each byte."""
    whole = tokenizer.encode(character, add_special_tokens=False)
    letters = [letter for token in tokenizer.convert_ids_to_tokens(whole) for letter in token]
    return tokenizer.convert_tokens_to_ids(letters)


def test_bytes_that_are_no_text_end_with_their_last_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Two of the three bytes of one character, then a letter: the decoder makes one character of the two."""
    euro, letter = single(tokenizer, "€"), single(tokenizer, "a")
    cut = [*euro[:2], *letter, *euro[:1]]
    text = decode(tokenizer, cut)
    assert len(text) == 3
    assert last_tokens(partial(decode, tokenizer), cut, [1, 2, 3]) == [1, 2, 3]


def test_a_decoder_that_drops_the_first_space() -> None:
    vocabulary = {"\N{LOWER ONE EIGHTH BLOCK}so": 0, "\N{LOWER ONE EIGHTH BLOCK}it": 1, "s": 2, "<unk>": 3}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert decode(tokenizer, [0, 1, 2]) == "so its"
    assert last_tokens(partial(decode, tokenizer), [0, 1, 2], [1, 2, 3, 5, 6]) == [0, 0, 1, 1, 2]


Play = Callable[..., Trajectory]


@pytest.fixture
def play(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Play]:
    """An episode of one response, "12+30=42" and the end token, with a reward and spans given as Python."""
    (tmp_path / "env.py").write_text(SCRIPT)
    environments: list[Environment] = []
    tokens = [*tokenizer.encode("12+30=42", add_special_tokens=False), tokenizer.eos_token_id]

    def play(spans: str, reward: str = "0", weights: dict[str, float] | None = None, **more: Any) -> Trajectory:
        environments.append(load_environment(tmp_path / "env.py", 5, weights))
        return one_episode(
            Prompt(0, "hello", tokenizer.encode("hello"), {"spans": spans, "reward": reward} | more),
            engine=ScriptedEngine(lambda token_ids, sampling: tokens),
            environment=environments[-1],
            tokenizer=tokenizer,
            sampling=Sampling(max_new_tokens=20, stop_token_ids=(tokenizer.eos_token_id,)),
            max_turns=1,
        )

    yield play
    for environment in environments:
        environment.close()


def paid(trajectory: Trajectory) -> dict[int, float]:
    """Place among the sampled tokens -> reward, where it is not 0."""
    (sequence,) = trajectory.sequences
    first = sequence.action_mask.tolist().index(True) if any(sequence.action_mask) else 0
    return {place - first: reward for place, reward in enumerate(sequence.rewards) if reward}


def test_rewards_stand_where_their_spans_end(play: Play, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.encode("12+30=42", add_special_tokens=False)
    place = written_out(tokenizer, tokens, "12+30=42")
    found = play("[{'span': [0, 5], 'reward': 0.25}, {'span': (6, 8), 'reward': True}]", "2")
    assert found.unscored is None
    expected = {place[4]: 0.25, place[7]: 1.0, len(tokens): 2.0}
    assert paid(found) == expected
    assert found.reward == 3.25
    assert place[7] == len(tokens) - 1, "before the end token"


def test_spans_may_overlap_and_share_a_token(play: Play) -> None:
    both = play("[{'span': [0, 8], 'reward': 0.1}, {'span': [3, 8], 'reward': 0.2}, {'span': [0, 1], 'reward': -1}]")
    assert sum(paid(both).values()) == pytest.approx(-0.7)
    assert math.fsum([0.1, 0.2]) in paid(both).values()
    assert paid(play("[{'span': [0, 8], 'reward': 0.3}, {'span': [0, 8], 'reward': -0.3}]")) == {}


def test_spans_belong_to_parts(play: Play) -> None:
    spans = "[{'span': [0, 2], 'reward': 1, 'part': 'step'}, {'span': [3, 8], 'reward': 0.5, 'part': 'step'}]"
    found = play(spans, "{'correct': True, 'step': 0.25}", {"step": 0.1})
    assert found.parts == {"correct": 1, "step": 1.75}
    assert found.reward == math.fsum([1, 0.1 * 1.75])
    assert sorted(paid(found).values()) == pytest.approx([0.05, 0.1, 1.025])


def test_the_total_counts_where_there_is_no_critic(play: Play) -> None:
    batch = pack([play("[{'span': [0, 2], 'reward': 3}]", "1"), play("[]", "2")])
    advantage_T = reinforce(batch, global_norm=False, norm_var=False)
    assert set(advantage_T[batch.action_T].tolist()) == {1, -1}


def test_gae_sees_them_where_they_stand(play: Play) -> None:
    """What has been earned is behind: later tokens have no share in it."""
    found = play("[{'span': [0, 2], 'reward': 3}]", "1")
    batch = pack([found])
    batch = batch.with_(value_T=torch.zeros_like(batch.reward_T))
    (first, last) = paid(found)
    advantages = gae(batch, gamma=1.0, lamda=1.0)[batch.action_T].tolist()
    assert advantages == [4.0] * (first + 1) + [1.0] * (last - first)


def test_rewards_of_tokens_that_do_not_train_still_count(play: Play) -> None:
    assert play("[{'span': [0, 2], 'reward': 3}]", "1", train=False).reward == 4


@pytest.mark.parametrize(
    ("spans", "cause"),
    [
        ("3", "step returned spans=an int; expected a list"),
        ("[3]", "step returned spans[0]=an int; expected a dict with reward, span"),
        ("[{'span': [0, 1]}]", "step returned spans[0]=a dict with span; expected a dict with reward, span"),
        (
            "[{'span': [0, 1], 'reward': 1, 'part': 'a'}]",
            "step returned spans[0]=a dict with span, reward, part; ",
        ),
        ("[{'span': [0, 9], 'reward': 1}]", "step returned spans[0] at [0, 9]; expected 0 <= start < end <= 8, the ch"),
        ("[{'span': [-1, 2], 'reward': 1}]", "step returned spans[0] at [-1, 2]; expected 0 <= start < end <= 8"),
        ("[{'span': [2, 2], 'reward': 1}]", "step returned spans[0] at [2, 2]; expected 0 <= start < end <= 8"),
        ("[{'span': [5, 2], 'reward': 1}]", "step returned spans[0] at [5, 2]; expected 0 <= start < end <= 8"),
        ("[{'span': [0, True], 'reward': 1}]", "step returned spans[0] at [0, True]; expected [start, end], two whole"),
        ("[{'span': [0, 1.0], 'reward': 1}]", "step returned spans[0] at [0, 1.0]; expected [start, end], two whole"),
        ("[{'span': 4, 'reward': 1}]", "step returned spans[0] at 4; expected [start, end], two whole numbers"),
        (
            "[{'span': [0, 1], 'reward': float('nan')}]",
            "step returned spans[0]['reward']=nan; expected a finite",
        ),
        ("[{'span': [0, 1], 'reward': None}]", "step returned spans[0]['reward']=None; expected a number or a bool"),
    ],
)
def test_a_span_that_cannot_be_is_no_reward(play: Play, spans: str, cause: str) -> None:
    found = play(spans, "1")
    assert found.unscored is not None
    assert found.unscored.startswith(cause)
    assert found.reward == 0


def test_with_parts_every_span_names_its_own(play: Play) -> None:
    without = play("[{'span': [0, 1], 'reward': 1}]", "{'a': 1}")
    assert without.unscored is not None
    assert without.unscored.endswith("expected a dict with part, reward, span, as the reward has parts")
    bad = play("[{'span': [0, 1], 'reward': 1, 'part': 'a/b'}]", "{'a': 1}")
    assert bad.unscored is not None
    assert bad.unscored.startswith("step returned spans[0] of a part named 'a/b'; a name has letters")
