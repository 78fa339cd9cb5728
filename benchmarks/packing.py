"""Plan of microbatches against Karmarkar-Karp: number of microbatches, imbalance, planning time.

    python benchmarks/packing.py [--json FILE]

512 sequences per step on 2 to 64 ranks. Lengths: *long-tailed* (log-normal, median 1,000, cut at 16,000), *bimodal*
(four fifths 200 to 600, the others 8,000 to 15,000), *GSM8K-like* (a question of about 100 tokens, an answer of about
150), and *GSM8K-like groups*: the same in units of four that stay together. At most 16,384 tokens per microbatch, for
GSM8K 8,192.

Imbalance: ranks synchronise in every microbatch, so a step takes the sum over microbatches of the largest cost of a
rank; the imbalance is that divided by the sum of the means, minus 1. *Of totals*: the same for what a rank computes in
the whole step, as if ranks did not synchronise. Karmarkar-Karp (largest differencing, into as many sets as there are
microbatches) has no limit of tokens: if the limit is exceeded, one microbatch is added. *tokens*: longest first into
the emptiest, by tokens alone.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from RL2.batch.packing import Rounds, cost, fill_evenly, fill_in_turn, plan, time_of

SEQUENCES, DRAWS = 512, 5
RANKS = (2, 8, 64)


def long_tailed(draw: random.Random) -> list[int]:
    return [min(16_000, 50 + int(draw.lognormvariate(math.log(950), 1.0)))]


def bimodal(draw: random.Random) -> list[int]:
    return [draw.randint(200, 600) if draw.random() < 0.8 else draw.randint(8_000, 15_000)]


def gsm8k(draw: random.Random, samples: int = 1) -> list[int]:
    question = max(30, int(draw.gauss(100, 45)))
    return [question + min(1024, int(draw.lognormvariate(math.log(150), 0.45))) for _ in range(samples)]


def gsm8k_groups(draw: random.Random) -> list[int]:
    return gsm8k(draw, 4)


LENGTHS: dict[str, tuple[Callable[[random.Random], list[int]], int]] = {
    "long-tailed": (long_tailed, 16_384),
    "bimodal": (bimodal, 16_384),
    "GSM8K-like": (gsm8k, 8_192),
    "GSM8K-like groups": (gsm8k_groups, 8_192),
}
"""Name -> generator of the lengths of one unit, and the limit of tokens."""


def by_tokens(lengths: Sequence[int], costs: Sequence[float], limit: int, ranks: int, number: int) -> Rounds | None:
    return fill_evenly(lengths, lengths, limit, ranks, number)


def karmarkar_karp(
    lengths: Sequence[int], costs: Sequence[float], limit: int, ranks: int, number: int
) -> Rounds | None:
    """Join the two partitions with the largest inner difference, largest set to smallest, until one is left."""
    size = ranks * number
    heap: list[tuple[float, int, list[tuple[float, Any]]]] = [
        (-costs[i], i, [(costs[i], i)] + [(0.0, None)] * (size - 1)) for i in range(len(costs))
    ]
    heapq.heapify(heap)
    for n in range(len(costs), 2 * len(costs) - 1):
        (_, _, a), (_, _, b) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(x + y, (p, q)) for (x, p), (y, q) in zip(a, reversed(b), strict=True)]
        joined.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], n, joined))
    bins = [_leaves(tree) for _, tree in heap[0][2]]
    if max(sum(lengths[i] for i in ids) for ids in bins) > limit:
        return None
    return [bins[i : i + ranks] for i in range(0, size, ranks)]


def _leaves(tree: Any) -> list[int]:
    found, open_ = [], [tree]
    while open_:
        node = open_.pop()
        if isinstance(node, tuple):
            open_.extend(node)
        elif node is not None:
            found.append(node)
    return found


def fewest(fill: Callable[..., Rounds | None]) -> Callable[..., Rounds]:
    """Return `fill` with as few microbatches as it can use."""

    def planned(lengths: Sequence[int], costs: Sequence[float], limit: int, ranks: int) -> Rounds:
        number = max(1, math.ceil(sum(lengths) / (limit * ranks)))
        while (rounds := fill(lengths, costs, limit, ranks, number)) is None:
            number += 1
        return rounds

    return planned


def ours(lengths: Sequence[int], costs: Sequence[float], limit: int, ranks: int) -> Rounds:
    return [list(bins) for bins in zip(*plan(lengths, limit, ranks, costs), strict=True)]


WAYS: dict[str, Callable[..., Rounds]] = {
    "plan": ours,
    "evenly": fewest(fill_evenly),
    "in turn": fewest(fill_in_turn),
    "tokens": fewest(by_tokens),
    "Karmarkar-Karp": fewest(karmarkar_karp),
}


def measure(way: Callable[..., Rounds], name: str, ranks: int) -> dict[str, float]:
    numbers, over, uneven, seconds = [], [], [], []
    make, limit = LENGTHS[name]
    for seed in range(DRAWS):
        draw = random.Random(seed)
        units: list[list[int]] = []
        while sum(map(len, units)) < SEQUENCES:
            units.append(make(draw))
        lengths, costs = [sum(unit) for unit in units], [sum(map(cost, unit)) for unit in units]
        begun = time.perf_counter()
        rounds = way(lengths, costs, limit, ranks)
        seconds.append(time.perf_counter() - begun)
        numbers.append(len(rounds))
        over.append(time_of(rounds, costs) * ranks / sum(costs) - 1)
        totals = [sum(costs[i] for bins in rounds for i in bins[rank]) for rank in range(ranks)]
        uneven.append(max(totals) * ranks / sum(costs) - 1)
    return {
        "microbatches": mean(numbers),
        "imbalance": mean(over),
        "of_totals": mean(uneven),
        "plan_s": median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    results = {}
    print(f"{'lengths':20}{'ranks':>5}  {'way':16}{'microbatches':>12}{'imbalance':>11}{'of totals':>11}{'ms':>8}")
    for name in LENGTHS:
        for ranks in RANKS:
            for title, way in WAYS.items():
                found = measure(way, name, ranks)
                results[f"{name}, {ranks} ranks, {title}"] = found
                print(
                    f"{name:20}{ranks:5}  {title:16}{found['microbatches']:12.1f}{found['imbalance']:11.1%}"
                    f"{found['of_totals']:11.1%}{1e3 * found['plan_s']:8.1f}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
