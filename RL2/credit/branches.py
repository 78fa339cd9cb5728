"""Values along responses from continuations: where to continue, what the continuations say, and how they train.

A *place* is a number of sampled tokens of a response. Whether a token ends at a place follows from the tokens up to it,
never from later ones or from the length of the response: the place before a token and the place behind it are then
stopping times, and V(next place) - V(last place) is an unbiased estimate of the token's advantage.

With `rollout.branch.train` a response and its continuations are a tree. Each of its 1 + M K leaves, M the largest
number of places and K that of continuations, has the same weight, and a token that leaves share has the sum of theirs.
At each place the response passes a leaf's share on to each of its continuations, so the shares at one depth add up to
1, and the gradient stays unbiased. What a response with fewer places does not pass on stays with it.

Shapes: T positions of a batch, A actions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from statistics import fmean

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from RL2.batch.advantages import by_step
from RL2.config.programs import RLConfig
from RL2.config.rollout import Branch
from RL2.credit.continuations import Diverged, Recorded, continued
from RL2.credit.search import Place
from RL2.data.prompts import Places
from RL2.errors import UserError
from RL2.io.progress import Progress
from RL2.rollout.continuation import decode
from RL2.rollout.episode import request_seed
from RL2.rollout.episodes import Episodes
from RL2.rollout.filters import usable
from RL2.rollout.scheduler import rollout_seed
from RL2.types import Branches, Prompt, Sequence, TokenBatch, Trajectory


def places_of(response: Sequence, branch: Branch, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the places of a response: the first `max_places` of those after each `every` events."""
    length = int(response.action_mask.sum())
    events = (place for place in _events(response, branch, tokenizer) if place < length)
    return list(islice(events, branch.every - 1, branch.every * branch.max_places, branch.every))


def _events(response: Sequence, branch: Branch, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Yield the number of sampled tokens up to each event; what follows an event plays no part in it."""
    place, was_break, was_sampled = 0, False, False
    columns = (response.token_ids.tolist(), response.action_mask.tolist(), response.logps.tolist())
    for token, sampled, logp in zip(*columns, strict=True):
        if branch.places == "turns" and was_sampled and not sampled:
            yield place
        was_sampled = sampled
        if not sampled:
            continue
        place += 1
        if branch.places == "tokens" or (branch.places == "unlikely" and np.exp(logp) < branch.below):
            yield place
        elif branch.places == "lines":
            is_break = "\n" in decode(tokenizer, [token])
            if is_break and not was_break:
                yield place
            was_break = is_break


@dataclass(frozen=True)
class Branching:
    """The continuations of the responses of a step."""

    config: RLConfig
    prompts: Seq[Prompt]
    episodes: Episodes

    @cached_property
    def places(self) -> Places:
        return Places(self.prompts)

    def grow(
        self, responses: Seq[Trajectory], step: int, progress: Progress
    ) -> tuple[list[Trajectory], dict[str, float]]:
        """Return `responses` with values along them, and metrics; the same on every process (collective).

        With `rollout.branch.train` each is followed by its continuations, whose prefix does not train. Raise UserError
        if an environment does not repeat an episode.
        """
        setting, branch = self.episodes.setting, self.config.rollout.branch
        places_N = [
            places_of(one.sequences[0], branch, setting.tokenizer) if len(one.sequences) == 1 else []
            for one in responses
        ]
        jobs = [(n, place, k) for n, of in enumerate(places_N) for place in of for k in range(branch.samples)]
        work = [partial(self._continue, responses[n], place, k, step) for n, place, k in jobs]
        with progress.phase(f"continuations of step {step}", len(work), "responses") as phase:
            found = self.episodes.share_out(work, phase.update)
        continuations: dict[tuple[int, int], list[Trajectory]] = {}
        for (n, place, k), one in zip(jobs, found, strict=True):
            if isinstance(one, str):
                row = f"row {responses[n].row}, sample {responses[n].sample}"
                raise UserError(f"adv.estimator=branch cannot continue {row}: {one}")
            numbered = replace(one, group=responses[n].group, sample=-1 - k)  # samples of the prompt are 0 and above
            continuations.setdefault((n, place), []).append(numbered)
        grown = list[Trajectory]()
        for n, (response, start) in enumerate(zip(responses, _starts(responses), strict=True)):
            kept = {place: usable(continuations[n, place], self.config) for place in places_N[n]}
            grown += tree(response, start, kept, branch)
        sampled = [one for of in continuations.values() for one in of]
        metrics = {
            "branch/places": fmean(map(len, places_N)),
            "branch/tokens": float(sum(one.num_tokens for one in sampled)),
            "branch/unscored": float(sum(one.unscored is not None for one in sampled)),
        }
        return grown, metrics

    async def _continue(self, response: Trajectory, place: int, k: int, step: int) -> Trajectory | str:
        """Return continuation `k` from a place as an episode whose prefix does not train, or the reason of none."""
        setting, (sequence,) = self.episodes.setting, response.sequences
        seed = rollout_seed(self.config, step)
        prompt, ids, sampled = self.prompts[self.places[response.row]], sequence.token_ids, sequence.action_mask
        recorded = Recorded(prompt, ids.tolist(), sampled.tolist(), response.group, seed)
        # turns of the response have the numbers from 0 on
        own_seed = request_seed(
            seed, response.group, response.sample, -1 - place * self.config.rollout.branch.samples - k
        )
        sampling = self.episodes.sampling(self.config.rollout.train_sampling_params)
        try:
            trajectory, _ = await continued(recorded, Place(place), setting, sampling, own_seed)
        except Diverged as error:
            return str(error)
        exclude_prefix(trajectory, place)
        return trajectory


def exclude_prefix(trajectory: Trajectory, number: int) -> None:
    """Make the first `number` actions of an episode part of what was given, which does not train."""
    for sequence in trajectory.sequences:
        for at in [at for at, is_action in enumerate(sequence.action_mask) if is_action][:number]:
            sequence.action_mask[at], sequence.logps[at], sequence.versions[at] = False, 0.0, -1
            number -= 1


def _starts(responses: Seq[Trajectory]) -> list[float | None]:
    """Return the mean reward of the other responses to the prompt of each; None if there are none."""
    rewards: dict[int, dict[int, float]] = {}
    for n, one in enumerate(responses):
        rewards.setdefault(one.group, {})[n] = one.reward
    others = ([x for other, x in rewards[one.group].items() if other != n] for n, one in enumerate(responses))
    return [fmean(of) if of else None for of in others]


def tree(
    response: Trajectory, start: float | None, continuations: Mapping[int, Seq[Trajectory]], branch: Branch
) -> list[Trajectory]:
    """Return a response with the values along it and, with `branch.train`, its continuations.

    `start` is the value of the prompt; without it the tokens up to the first place do not train. `continuations` maps
    places to those that count, and a place without any is no place. A continuation is compared with the others from its
    place and with the response itself.
    """
    leaves = 1 + branch.max_places * branch.samples
    at, values, own, others = list[int](), list[float](), [leaves], list[Trajectory]()
    for place, found in continuations.items():
        if not found:
            continue
        rewards = [one.reward for one in found]
        at.append(place)
        values.append(fmean(rewards))
        own.append(own[-1] - len(found))
        for k, one in enumerate(found):
            baseline = fmean([*rewards[:k], *rewards[k + 1 :], response.reward])
            others.append(replace(one, branches=Branches((), (baseline, one.reward), (1 / leaves,))))
    values.append(response.reward)
    values.insert(0, values[0] if start is None else start)
    shares = [number / leaves if branch.train else 1.0 for number in own]
    branches = Branches(tuple(at), tuple(values), tuple(shares))
    return [replace(response, branches=branches), *(others if branch.train else [])]


def with_branches(batch: TokenBatch, trajectories: Seq[Trajectory]) -> TokenBatch:
    """Return `batch`, made of `trajectories`, with the values around each action and its share of the tree."""
    steps = by_step(batch)
    counts = torch.bincount(steps.number_A, minlength=len(trajectories)).tolist()
    before, after, share = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for one, count in zip(trajectories, counts, strict=True):
        assert one.branches is not None
        lengths = np.diff([0, *one.branches.places, count])
        for found, values in (
            (before, one.branches.values[:-1]),
            (after, one.branches.values[1:]),
            (share, one.branches.shares),
        ):
            found.append(np.repeat(np.array(values), lengths))

    def at_actions(parts: list[np.ndarray]) -> torch.Tensor:
        values_A = torch.from_numpy(np.concatenate(parts)).float()
        return torch.zeros(steps.num_positions).index_copy_(0, steps.action_A, values_A)

    share_T = at_actions(share)
    is_tree = bool((share_T[batch.action_T] != 1).any())
    return batch.with_(before_T=at_actions(before), after_T=at_actions(after), share_T=share_T if is_tree else None)
