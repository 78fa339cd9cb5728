"""Rate at which `rl2 compare` finds a difference between a method and itself: the table of docs/evaluation.md.

    python benchmarks/false_verdicts.py [--number 2000] [--problems 100] [--samples 4] [--spreads 0 0.1 0.3 1]

Problems differ in difficulty, equally for all runs; the log-odds of each run are shifted by a normal variable.
"""

from __future__ import annotations

import argparse

import numpy as np

from RL2.tools.eval.compare import Scores, compare

PAIRS = ((1, 1), (1, 3), (2, 2), (3, 3))


def runs(rng: np.random.Generator, odds_P: np.ndarray, number: int, spread: float, samples: int) -> list[Scores]:
    """Return the scores of `number` runs of the method whose log-odds are `odds_P` on average over its seeds."""
    chances = [1 / (1 + np.exp(-odds_P - rng.normal(0, spread))) for _ in range(number)]
    return [dict(zip(map(str, range(len(p))), rng.binomial(samples, p) / samples, strict=True)) for p in chances]


def false_verdicts(pair: tuple[int, int], spread: float, number: int, problems: int, samples: int) -> float:
    """Return the share of `number` comparisons of a method with itself that find a difference."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(number):
        chance_P = rng.beta(2, 1, problems).clip(0.01, 0.99)
        odds_P = np.log(chance_P / (1 - chance_P))
        first, second = (runs(rng, odds_P, size, spread, samples) for size in pair)
        found += compare(first, second).verdict != "cannot tell"
    return found / number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument(
        "--spreads", type=float, nargs="+", default=(0.0, 0.1, 0.3, 1.0), help="standard deviations between seeds"
    )
    given = parser.parse_args()
    print(f"| runs | {' | '.join(f'{spread:g}' for spread in given.spreads)} |")
    print(f"|{'---|' * (1 + len(given.spreads))}")
    for pair in PAIRS:
        cells = []
        for spread in given.spreads:
            # two single runs with different shifts are different models, which is what this verdict is about
            means_something = pair != (1, 1) or spread == 0
            size = given.number, given.problems, given.samples
            cells.append(f"{false_verdicts(pair, spread, *size):.1%}" if means_something else "")
        print(f"| {pair[0]} and {pair[1]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
