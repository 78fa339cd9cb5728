"""Coverage and cost of token credit on tasks whose exact values are known.

    python benchmarks/credit.py [--repetitions 1000] [--answers 12] [--out credit.svg] [--json FILE]
    python benchmarks/credit.py --compare RUN/replay_000020/credit.json OTHER/replay_000020/credit.json ...

A task is a machine with a few states. Each token moves it from one state to another, and the last state has the reward.
Dynamic programming over the states gives the exact value of every prefix. The first part draws tasks at random and
counts how many intervals hold the true advantage after an adaptive search. The second part plants a few tokens that
decide among many that do not, and counts the tokens that are sampled until the intervals of all planted ones exclude 0:
by the search, and with the same number of continuations from every prefix.

With --compare, nothing is sampled: it says how well the order of objectives by agreement is the same in several results
of `rl2 credit`, such as those of other seeds.

Shapes: T tokens of an answer, S states, V tokens of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

import numpy as np

from RL2.credit.agreement import kendall
from RL2.credit.intervals import mean_interval
from RL2.credit.search import Answer, Bounds, Place, Search

DECISIVE = 0.2
"""Absolute advantage from which on a planted token has to be found."""
ROUND = 4
"""Continuations that each prefix gets at a time from the uniform methods."""
CAP = 3_000_000
"""Sampled tokens of an answer after which a method is given up."""


@dataclass
class Task:
    """A task with a few states, and the policy that is looked at."""

    chance_TSV: np.ndarray
    """Probability of each token."""
    next_TSV: np.ndarray
    """State after each token."""
    reward_S: np.ndarray
    values_TS: np.ndarray = field(init=False)
    """Exact mean reward of the continuations, [T + 1, S]."""

    def __post_init__(self) -> None:
        values = [self.reward_S]
        for chance_SV, next_SV in zip(self.chance_TSV[::-1], self.next_TSV[::-1], strict=True):
            values.append((chance_SV * values[-1][next_SV]).sum(-1))
        self.values_TS = np.array(values[::-1])

    @property
    def length(self) -> int:
        return len(self.chance_TSV)

    def sample(self, rng: np.random.Generator, at: int, state: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of `number` continuations, int [number, T - at], and their rewards."""
        states, tokens = np.full(number, state), np.zeros((number, self.length - at), int)
        for t in range(at, self.length):
            cumulative = self.chance_TSV[t][states].cumsum(-1)
            tokens[:, t - at] = (rng.random((number, 1)) * cumulative[:, -1:] < cumulative).argmax(-1)
            states = self.next_TSV[t][states, tokens[:, t - at]]
        return tokens, self.reward_S[states]


@dataclass
class Told:
    """An answer to a task, with the states that it went through."""

    task: Task
    answer: Answer
    states: list[int]
    used: int = 0
    """Tokens sampled so far."""

    @property
    def value_T(self) -> list[float]:
        """Exact value of each place, T + 1 of them."""
        return [float(self.task.values_TS[t, state]) for t, state in enumerate(self.states)]

    @property
    def advantage_T(self) -> list[float]:
        values = self.value_T
        return [after - before for before, after in pairwise(values)]

    def other(self, t: int) -> float:
        """Return the exact advantage of the alternative to token t."""
        state = self.task.next_TSV[t][self.states[t], self.answer.other_T[t]]
        return float(self.task.values_TS[t + 1, state]) - self.value_T[t]

    def continued(self, rng: np.random.Generator, place: Place, number: int) -> list[tuple[list[int], float]]:
        """Return tokens and reward of continuations from `place`, and count their tokens."""
        at, state = place.at, self.states[place.at]
        if place.token is not None:
            at, state = at + 1, int(self.task.next_TSV[at][state, place.token])
        tokens, rewards = self.task.sample(rng, at, state, number)
        self.used += tokens.size
        return list(zip(tokens.tolist(), rewards.tolist(), strict=True))


def told(rng: np.random.Generator, task: Task) -> Told:
    """Return an answer of the policy to a task."""
    tokens = task.sample(rng, 0, 0, 1)[0][0].tolist()
    states = [0]
    for t, token in enumerate(tokens):
        states.append(int(task.next_TSV[t][states[-1], token]))
    ranked = [np.argsort(-task.chance_TSV[t][state]) for t, state in enumerate(states[:-1])]
    others = tuple(int(rank[1] if rank[0] == token else rank[0]) for rank, token in zip(ranked, tokens, strict=True))
    chances = tuple((float(task.chance_TSV[t][states[t], token]),) * 2 for t, token in enumerate(tokens))
    return Told(task, Answer(tuple(tokens), chances, float(task.reward_S[states[-1]]), others), states)


def drawn(rng: np.random.Generator, length: int = 12, states: int = 3, rewards: Sequence[float] = (0, 0, 1)) -> Task:
    """Return a task with random chances, in which a token often keeps the state."""
    shape = (length, states, 4)
    stays = rng.random(shape) < 0.7
    after = np.where(stays, np.arange(states)[None, :, None], rng.integers(0, states, shape))
    return Task(rng.dirichlet(np.full(4, 0.4), shape[:2]), after, np.array(rewards, float))


def planted(rng: np.random.Generator, length: int, pivots: int) -> Task:
    """Return a task of which `pivots` tokens in the first nine tenths raise or lower the chance of success.

    The chance begins at 0.5, and a pivot moves it by 0.25 up or down, at most to 0 or 1. The other tokens mean nothing;
    half of them are all but certain, as in text. The last token is right with the chance that is left.
    """
    states, vocabulary = 7, 6  # five chances, and wrong and right
    next_TSV = np.tile(np.arange(states)[None, :, None], (length, 1, vocabulary))
    sharpness = np.where(rng.random((length, 1)) < 0.5, 0.02, 1.0).repeat(vocabulary, 1)
    chance_TSV = np.array([rng.dirichlet(row, states) + 1e-9 for row in sharpness])
    for t in rng.choice(length * 9 // 10, pivots, replace=False):
        chance_TSV[t] = np.eye(vocabulary)[:2].mean(0)
        next_TSV[t, :5, 0], next_TSV[t, :5, 1] = np.clip(np.arange(5) + 1, 0, 4), np.clip(np.arange(5) - 1, 0, 4)
    right_S = np.array([0, 0.25, 0.5, 0.75, 1, 0, 0])
    chance_TSV[-1] = 0
    chance_TSV[-1, :, 0], chance_TSV[-1, :, 1] = right_S, 1 - right_S
    next_TSV[-1, :, 0], next_TSV[-1, :, 1:] = 6, 5
    chance_TSV /= chance_TSV.sum(-1, keepdims=True)
    starts = [2, 0, 1, 3, 4, 5, 6]  # state 0 is where an answer begins: give it an even chance
    order = np.argsort(starts)
    return Task(chance_TSV[:, starts], order[next_TSV[:, starts]], np.array([0.0] * 6 + [1.0])[starts])


def searched(rng: np.random.Generator, of: Told, budget: int, *, looks_at_all: bool, places: int = 4) -> Search:
    """Search an answer until everything is decided or `budget` tokens are sampled."""
    search = Search(of.answer, looks_at_all=looks_at_all)
    while of.used < budget and (wanted := search.next(places)):
        for place, number in wanted:
            for tokens, reward in of.continued(rng, place, number):
                search.add(place, tokens, reward)
    return search


def coverage(seeds: Sequence[int], budget: int = 20_000) -> dict[str, float]:
    """Return how many intervals hold the truth after a search, of tokens and alternatives, and of whole answers."""
    held = looked = whole = decided = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        of = told(rng, drawn(rng, rewards=(0, 0, 1) if seed % 4 else (0, 0.5, 1)))
        search = searched(rng, of, budget, looks_at_all=seed % 2 == 0)
        values = search.values()
        found: list[tuple[Bounds, float]] = list(zip(search.advantages(values), of.advantage_T, strict=True))
        others = [(search.alternative(t, values), of.other(t)) for t in range(of.task.length)]
        decided += sum(bounds.is_decided for bounds, _ in found)
        found += [(bounds, true) for bounds, true in others if bounds is not None]
        right = [bounds.low - 1e-9 <= true <= bounds.high + 1e-9 for bounds, true in found]
        held, looked, whole = held + sum(right), looked + len(right), whole + all(right)
    return {
        "repetitions": len(seeds),
        "intervals": looked,
        "held": held / looked,
        "answers_held": whole / len(seeds),
        "decided_tokens": decided / len(seeds),
    }


def is_found(of: Told, found: Sequence[Bounds]) -> bool:
    """Return whether the interval of each token that decides excludes 0, on the side of the truth."""
    pairs = zip(found, of.advantage_T, strict=True)
    return all(abs(true) < DECISIVE or (bounds.is_decided and bounds.value * true > 0) for bounds, true in pairs)


def by_search(rng: np.random.Generator, of: Told) -> int:
    """Return how many tokens the search samples until it has found all that decide."""
    search = Search(of.answer, looks_at_all=False)
    while of.used < CAP and not is_found(of, search.advantages()):
        wanted = search.next(1)
        if not wanted:
            return CAP
        for place, number in wanted:
            for tokens, reward in of.continued(rng, place, number):
                search.add(place, tokens, reward)
    return of.used


def uniformly(rng: np.random.Generator, of: Told, *, shares: bool) -> int:
    """Return the same with as many continuations from every prefix.

    With `shares`, prefixes share continuations and what is known of chances, as in the search. Otherwise each has its
    own, as with the Monte-Carlo values of VinePPO, arXiv 2410.01679.
    """
    length = of.task.length
    search = Search(of.answer)
    counts = [Counter[float]() for _ in range(length)]
    while of.used < CAP:
        for t in range(length):
            for tokens, reward in of.continued(rng, Place(t), ROUND):
                counts[t][reward] += 1
                if shares:
                    search.add(Place(t), tokens, reward)
        if is_found(of, search.advantages() if shares else alone(counts, of.answer.reward, search.alpha)):
            break
    return of.used


def alone(counts: Sequence[Counter[float]], reward: float, alpha: float) -> list[Bounds]:
    """Return advantages from the continuations of each prefix alone, with a union bound."""
    ends = [mean_interval(one, alpha / len(counts)) for one in counts] + [(reward, reward)]
    means = [sum(value * number for value, number in one.items()) / one.total() for one in counts] + [reward]
    return [
        Bounds(means[t + 1] - means[t], ends[t + 1][0] - ends[t][1], ends[t + 1][1] - ends[t][0])
        for t in range(len(counts))
    ]


def costs(answers: int, length: int, pivots: int) -> dict[str, list[int]]:
    """Return the tokens that each method samples for each of some answers."""
    found: dict[str, list[int]] = {"search": [], "uniform, shared": [], "uniform": []}
    for seed in range(answers):
        rng = np.random.default_rng(seed)
        of = told(rng, planted(rng, length, pivots))
        for name, used in (
            ("search", by_search(np.random.default_rng(seed), Told(of.task, of.answer, of.states))),
            (
                "uniform, shared",
                uniformly(np.random.default_rng(seed), Told(of.task, of.answer, of.states), shares=True),
            ),
            ("uniform", uniformly(np.random.default_rng(seed), Told(of.task, of.answer, of.states), shares=False)),
        ):
            found[name].append(used)
    return found


def compare(files: Sequence[Path]) -> list[str]:
    """Return lines about the order of objectives in several results of `rl2 credit`."""
    tables = [
        {row["title"]: row["rank"][0] for row in json.loads(file.read_text())["agreement"] if row["rank"]}
        for file in files
    ]
    titles = [title for title in tables[0] if all(title in table for table in tables)]
    titles.sort(key=lambda title: -fmean(table[title] for table in tables))
    lines = [f"{title}: {', '.join(f'{table[title]:.3f}' for table in tables)}" for title in titles]
    for a, b in combinations(range(len(tables)), 2):
        tau = kendall([tables[a][title] for title in titles], [tables[b][title] for title in titles])
        lines.append(f"Kendall's tau of {files[a]} and {files[b]}: {tau:.2f}")
    return lines


def plot(found: dict[int, dict[str, list[int]]], file: Path) -> None:
    """Draw the sampled tokens of each method against the length of the answer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for number, name in enumerate(next(iter(found.values()))):
        middle = [median(by_method[name]) for by_method in found.values()]
        low, high = ([float(np.quantile(by_method[name], q)) for by_method in found.values()] for q in (0.25, 0.75))
        line = axes.plot(list(found), middle, marker="os^"[number], label=name)[0]
        axes.fill_between(list(found), low, high, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="tokens of the answer", ylabel="sampled tokens", xscale="log", yscale="log")
    axes.set_xticks(list(found), [str(length) for length in found])
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.set_title("Sampled tokens until the intervals of all planted tokens exclude 0", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--answers", type=int, default=12)
    parser.add_argument("--lengths", default="32,64,128")
    parser.add_argument("--pivots", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", type=Path, nargs="+")
    options = parser.parse_args()
    if options.compare:
        print("\n".join(compare(options.compare)))
        return
    begun = perf_counter()
    covered = coverage(range(options.repetitions))
    print(f"coverage: {covered} in {perf_counter() - begun:.0f} s")
    found = {}
    for length in map(int, options.lengths.split(",")):
        found[length] = costs(options.answers, length, options.pivots)
        middle = {name: median(used) for name, used in found[length].items()}
        ratios = ", ".join(f"{name} {used:,.0f} ({used / middle['search']:.1f} times)" for name, used in middle.items())
        print(f"{length} tokens, {options.pivots} planted: {ratios}")
    if options.json:
        options.json.write_text(json.dumps({"coverage": covered, "costs": found}))
    if options.out:
        plot(found, options.out)


if __name__ == "__main__":
    main()
