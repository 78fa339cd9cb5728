"""Places of responses, trees of continuations, and the gradient that they give, on a task that can be enumerated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from rl_settings import rl_config
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.batch.advantages import branch
from RL2.batch.packing import loss_weights, pack
from RL2.config.rollout import Branch
from RL2.credit.branches import exclude_prefix, places_of, tree, with_branches
from RL2.errors import ConfigError
from RL2.rollout.continuation import append
from RL2.trainer.unused_settings import refuse_unused_settings
from RL2.types import Sequence, TokenBatch, Trajectory


def response(tokenizer: PreTrainedTokenizerBase, *turns: str, logps: tuple[float, ...] = ()) -> Sequence:
    """Return turns with an observation of two tokens before each."""
    found = Sequence()
    for turn in turns:
        ids = tokenizer.encode(turn, add_special_tokens=False)
        append(found, [5, 6])
        append(found, ids, [-0.01] * len(ids))
    if logps:
        found.logps[found.action_mask] = logps[: found.action_mask.sum()]
    return found


def test_places(tokenizer: PreTrainedTokenizerBase) -> None:
    def of(sequence: Sequence, **settings: object) -> list[int]:
        return places_of(sequence, Branch(**settings), tokenizer)  # type: ignore[arg-type]

    text = response(tokenizer, "ab\n\ncd\ne")  # a token for each character
    assert sum(text.action_mask) == 8
    assert of(text) == [3, 7], "the second break of an empty line ends none"
    assert of(text, places="tokens", every=3) == [3, 6]
    assert of(text, places="tokens", every=2) == [2, 4, 6], "the end of a response is no place"
    assert of(text, places="tokens", max_places=2) == [1, 2]
    assert of(response(tokenizer, "ab", "cd", "e"), places="turns") == [2, 4]
    unsure = response(tokenizer, "QZQZQZ", logps=tuple(math.log(p) for p in (0.5, 0.95, 0.2, 0.99, 0.3, 0.9)))
    assert of(unsure, places="unlikely") == [1, 3, 5]
    assert of(unsure, places="unlikely", every=2) == [3]
    assert of(unsure, places="unlikely", below=0.25) == [3]


@pytest.mark.parametrize(
    "settings", [{}, {"places": "turns"}, {"places": "unlikely"}, {"places": "tokens", "every": 2}]
)
def test_no_place_depends_on_what_follows(tokenizer: PreTrainedTokenizerBase, settings: dict[str, object]) -> None:
    """So that places are stopping times: those of a beginning are places of the whole."""
    rng, rule = np.random.default_rng(0), Branch(max_places=9, **settings)  # type: ignore[arg-type]
    for _ in range(30):
        text = "".join(rng.choice(list("ab\n"), 12))
        logps = tuple(np.log(rng.uniform(0.5, 1, 12)).tolist())
        whole = response(tokenizer, text[:5], text[5:], logps=logps)
        places = places_of(whole, rule, tokenizer)
        for end in range(3, len(whole.token_ids)):
            part = Sequence(*(getattr(whole, name)[:end] for name in ("token_ids", "action_mask", "logps", "rewards")))
            assert places_of(part, rule, tokenizer) == [place for place in places if place < sum(part.action_mask)]


def told(rewards: list[float], length: int = 6) -> list[Trajectory]:
    """Return responses of so many tokens to a prompt of two."""
    number = 2 + length
    return [
        Trajectory(
            row=0,
            group=0,
            sample=n,
            sequences=[
                Sequence(
                    token_ids=[0] * number,
                    action_mask=[False] * 2 + [True] * length,
                    logps=[0.0] * number,
                    rewards=[0.0] * (number - 1) + [reward],
                    versions=[-1] * 2 + [0] * length,
                )
            ],
        )
        for n, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize("train", [False, True])
def test_values_and_shares_of_a_tree(train: bool) -> None:
    (trunk,) = told([1.0])
    continuations = {2: told([0.0, 1.0, 1.0]), 3: [], 5: told([1.0, 0.0])}
    for place, of in continuations.items():
        for one in of:
            exclude_prefix(one, place)
    grown = tree(trunk, 0.25, continuations, Branch(max_places=3, samples=3, train=train))
    batch = with_branches(pack(grown), grown)
    assert batch.before_T is not None and batch.after_T is not None
    first = batch.sequence_T == 0
    assert batch.before_T[batch.action_T & first].tolist() == pytest.approx([0.25] * 2 + [2 / 3] * 3 + [0.5])
    assert batch.after_T[batch.action_T & first].tolist() == pytest.approx([2 / 3] * 2 + [0.5] * 3 + [1])
    if not train:
        assert len(grown) == 1 and batch.share_T is None
        return
    assert len(grown) == 6 and batch.share_T is not None
    # 1 + 3 * 3 leaves; the second place had no continuation that counts, and one of the third is missing
    assert batch.share_T[batch.action_T & first].tolist() == pytest.approx([1.0] * 2 + [0.7] * 3 + [0.5])
    at_depth = torch.zeros(6).index_add_(0, batch.position_ids_T[batch.action_T] - 1, batch.share_T[batch.action_T])
    assert at_depth.tolist() == pytest.approx([1.0] * 6)
    # each is compared with the others from its place, and with the response
    expected = [(1.0, 0), (2 / 3, 1), (2 / 3, 1), (0.5, 1), (1.0, 0)]
    assert [one.branches.values for one in grown[1:] if one.branches] == [pytest.approx(pair) for pair in expected]
    assert [one.num_tokens for one in grown] == [6, 4, 4, 4, 1, 1]
    assert torch.equal(branch(batch), (batch.after_T - batch.before_T) * batch.action_T)


def test_weights_of_trees() -> None:
    """Without continuations that train, all is as ever; with them a tree counts as one response of its mean length."""
    trunks = told([1.0, 0.0])
    plain = pack(trunks)
    shares = torch.ones_like(plain.reward_T)
    for level in ("token", "constant"):
        weights = partial(loss_weights, level=level, length=10)
        assert torch.equal(weights(plain), weights(plain.with_(share_T=shares)))
    grown = tree(trunks[0], 0.0, {2: told([1.0], length=9)}, Branch(max_places=1, samples=1, train=True))
    exclude_prefix(grown[1], 2)
    batch = with_branches(pack(grown), grown)
    constant = loss_weights(batch, level="constant", length=10)
    assert constant[batch.action_T].tolist() == pytest.approx([0.1] * 2 + [0.05] * 4 + [0.05] * 7)
    by_token = loss_weights(batch, level="token")
    assert float(by_token.sum()) == pytest.approx(1)
    assert by_token[batch.action_T].tolist() == pytest.approx((constant[batch.action_T] / constant.sum()).tolist())


# The task: up to L tokens out of {0: end, 1, 2}, a policy with logits of its own for every prefix.
LONGEST, VOCABULARY = 4, 3
Prefix = tuple[int, ...]


class Table:
    """A policy with a table of logits, the reward of every response, and the exact gradient of its mean."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.prefixes = [p for p in self._reachable(()) if not self.is_whole(p)]
        self.number = {prefix: n for n, prefix in enumerate(self.prefixes)}
        self.chance_PV = rng.dirichlet(np.full(VOCABULARY, 2.0), len(self.prefixes))
        self.cumulative = self.chance_PV.cumsum(1).tolist()
        whole = [p for p in self._reachable(()) if self.is_whole(p)]
        # long responses that begin with 1 are good, so the length says much about the reward
        self.reward = {p: float(rng.random() < (1 if p[0] == 1 and len(p) > 2 else 0.1)) for p in whole}

    @staticmethod
    def is_whole(prefix: Prefix) -> bool:
        return len(prefix) == LONGEST or prefix[-1:] == (0,)

    def _reachable(self, prefix: Prefix) -> Iterator[Prefix]:
        yield prefix
        if not self.is_whole(prefix):
            for token in range(VOCABULARY):
                yield from self._reachable((*prefix, token))

    def value(self, prefix: Prefix) -> float:
        if self.is_whole(prefix):
            return self.reward[prefix]
        chances = self.chance_PV[self.number[prefix]]
        return sum(float(p) * self.value((*prefix, token)) for token, p in enumerate(chances))

    def reached(self, prefix: Prefix) -> float:
        return math.prod(float(self.chance_PV[self.number[prefix[:t]], token]) for t, token in enumerate(prefix))

    @property
    def gradient_PV(self) -> Tensor:
        """Return the derivative of the mean reward by each logit: P(prefix) p (V(prefix, token) - V(prefix))."""
        rows = [
            [
                self.reached(prefix) * float(p) * (self.value((*prefix, token)) - self.value(prefix))
                for token, p in enumerate(self.chance_PV[n])
            ]
            for n, prefix in enumerate(self.prefixes)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def sample(self, rng: np.random.Generator, prefix: Prefix) -> Trajectory:
        """Return a response that begins with `prefix`, which does not train."""
        begun = len(prefix)
        while not self.is_whole(prefix):
            draw, cumulative = rng.random(), self.cumulative[self.number[prefix]]
            prefix = (*prefix, next((t for t, c in enumerate(cumulative) if draw < c), VOCABULARY - 1))
        return self.response(prefix, begun)

    def response(self, prefix: Prefix, begun: int) -> Trajectory:
        """Return a whole response of which the first `begun` tokens do not train."""
        n = len(prefix)
        logps = [math.log(self.chance_PV[self.number[prefix[:t]], prefix[t]]) for t in range(n)]
        rewards = [0.0] * n + [self.reward[prefix]]
        mask = [False] * (begun + 1) + [True] * (n - begun)
        return Trajectory(0, 0, 0, [Sequence([9, *prefix], mask, [0.0, *logps], rewards)])


Places = Callable[[Sequence], list[int]]


def estimated(table: Table, places: Places, settings: Branch, number: int) -> tuple[Tensor, float]:
    """Return the mean gradient by each logit of trees of every response, weighted by its chance, and its error.

    20 times, `number` trees are sampled, of each response in proportion to its chance, and at least one.
    """
    rng, found, value = np.random.default_rng(0), list[Tensor](), table.value(())
    for _ in range(20):
        gradient_PV = torch.zeros(len(table.prefixes), VOCABULARY, dtype=torch.float64)
        for whole in table.reward:
            grown, chance = list[Trajectory](), table.reached(whole)
            for n in range(max(1, round(number * chance))):
                trunk, start = table.response(whole, 0), rng.binomial(7, value) / 7  # the mean of seven others
                continuations = {
                    place: [table.sample(rng, whole[:place]) for _ in range(settings.samples)]
                    for place in places(trunk.sequences[0])
                }
                grown += [replace(one, group=n) for one in tree(trunk, start, continuations, settings)]
            gradient_PV += chance * _gradient(table, grown)
        found.append(gradient_PV)
    stacked = torch.stack(found)
    return stacked.mean(0), float((stacked.var(0).sum() / len(found)).sqrt())


def _gradient(table: Table, grown: list[Trajectory]) -> Tensor:
    """Return the gradient of the weighted loss of `reinforce` by the logits: minus A weight (onehot - p), summed."""
    batch = with_branches(pack(grown), grown)
    weight_T = loss_weights(batch, level="constant", length=1).double() * branch(batch).double()
    prefix_T, label_T = _states(table, batch), batch.labels_T
    chance_PV = torch.tensor(table.chance_PV)
    scores_TV = torch.nn.functional.one_hot(label_T.clamp(max=VOCABULARY - 1), VOCABULARY) - chance_PV[prefix_T]
    keep = batch.action_T
    return torch.zeros_like(chance_PV).index_add_(0, prefix_T[keep], (weight_T[:, None] * scores_TV)[keep])


def _states(table: Table, batch: TokenBatch) -> Tensor:
    labels = batch.labels_T.tolist()
    return torch.tensor(
        [table.number[tuple(labels[a:t])] for a, b in pairwise(batch.cu_seqlens.tolist()) for t in range(a, b)]
    )


RULES: dict[str, Branch] = {
    "tokens": Branch(places="tokens", max_places=2, samples=2),
    "tokens, trees": Branch(places="tokens", max_places=3, samples=2, train=True),
    "unlikely, trees": Branch(places="unlikely", below=0.4, max_places=2, samples=3, train=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_the_gradient_is_unbiased(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Monte Carlo against the exact gradient, within 2 % of its norm."""
    table, settings = Table(seed=3), RULES[name]
    exact_PV, places = table.gradient_PV, partial(places_of, branch=settings, tokenizer=tokenizer)
    found_PV, error = estimated(table, places, settings, number=260)
    norm = float(exact_PV.norm())
    assert error < 0.0125 * norm, "too few trees to tell"
    assert float((found_PV - exact_PV).norm()) < 0.02 * norm


@pytest.mark.slow
def test_places_that_follow_from_the_length_would_be_biased() -> None:
    """The half of a response says how long it is going to be; this is why no such places are offered."""
    table, settings = Table(seed=3), RULES["tokens"]
    found_PV, error = estimated(table, lambda sequence: [sum(sequence.action_mask) // 2], settings, number=200)
    norm = float(table.gradient_PV.norm())
    assert float((found_PV - table.gradient_PV).norm()) > max(0.05 * norm, 4 * error)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("rollout.branch.samples=2", "adv.estimator=rloo"), "rollout.branch has no effect with adv.estimator=rloo"),
        (("rollout.max_staleness=1",), "rollout.max_staleness=1: older weights sampled the responses"),
        (("rollout.engine=vllm",), "rollout.engine=vllm: it was tried with embedded only"),
        (("rollout.train_sampling_params.stop=[x]",), "a stop string may begin before the place"),
        (("train_data.responses_per_prompt=1",), "adv.estimator=branch compares a response|responses_per_prompt=1"),
        (("adv.overlong_buffer=2",), "adv.overlong_buffer=2: the values have no penalty for length"),
        (("actor.kl.coef=0.1", "actor.kl.type=reward"), "actor.kl.type=reward: the values have no KL divergence"),
        (("rollout.branch.places=turns",), "rollout.max_turns=1: there is no end of a turn"),
        (("rollout.branch.train=true", "actor.avg_level=sequence"), "actor.avg_level=sequence: a tree has no length"),
        (("rollout.branch.train=true", "actor.update_per_rollout=2"), "actor.update_per_rollout=2, which may cut a"),
        (("rollout.branch.train=true", "actor.imitation.coef=0.1"), "does not go with actor.imitation.coef"),
        (("actor.objective=spo",), "adv.estimator=branch has no effect: actor.objective=spo reads no advantages"),
    ],
)
def test_what_branches_do_not_go_with_is_refused(overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        refuse_unused_settings(rl_config("adv.estimator=branch", *overrides))
    refuse_unused_settings(rl_config("adv.estimator=branch", "rollout.branch.train=true"))


def test_a_probability_that_no_place_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.branch\.below=0\.5 has no effect with places=lines"):
        rl_config("adv.estimator=branch", "rollout.branch.below=0.5")
