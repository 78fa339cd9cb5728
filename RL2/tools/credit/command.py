"""`rl2 credit`: which tokens of a kept step's answers decided their rewards, measured by continuations.

Each round asks the search of every answer where to sample next, samples all of these continuations at once, and appends
them to a file. A killed run reads the file and goes on. Rounds and seeds depend on nothing else, so the results are the
same.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from RL2.credit.continuations import Continuation, Diverged, continuation
from RL2.credit.search import Place
from RL2.errors import ConfigError, UserError, first_line
from RL2.io.durable import write_text
from RL2.io.jsonl import read_lines, remove_incomplete_line
from RL2.io.progress import Progress
from RL2.rollout.continuation import decode
from RL2.rollout.episode import request_seed
from RL2.tools.credit.cases import EXAMPLES, Case, find_faults, make_case, pairs_of, result_of
from RL2.tools.credit.kept import KeptStep, open_step
from RL2.tools.credit.pulls import Objectives
from RL2.tools.credit.table import agreements
from RL2.trainer.run import kept_step

RESULT, SAMPLES = "credit.json", "credit_samples.jsonl"
PLACES = 16
"""Number of places from which all answers together are continued in one round, if there are fewer answers."""
OBJECTIVES = (
    *("spo", "spo actor.path.detach_target=true", "spo_0p5", "spo_0p5 actor.path.region=all", "binary_jsd"),
    *("rank_jsd", "rank_kl", "positive_ce", "dft", "reinforce", "ppo", "gspo", "cispo", "sapo"),
    *("importance_sampling", "dppo", "dro", "gmpo", "luspo", "vespo", "a2po"),
)
"""Objectives that are looked at unless some are named."""
Wanted = list[tuple[int, Place, int]]
"""Number of an answer, a place of it, and a number of continuations."""


@dataclass(frozen=True, kw_only=True)
class CreditRequest:
    """Settings of `rl2 credit`, documented in its help."""

    run: Path
    step: str = "latest"
    budget: int = 200_000
    answers: int = 20
    objectives: tuple[str, ...] = ()
    """Empty: those of `OBJECTIVES` that fit the run."""
    engine: str = ""
    """Empty: the run's."""
    rewards: tuple[float, float] = (0.0, 1.0)
    longest_whole: int = 64
    precision: float = 0.05
    seed: int = 0
    pairs: Path | None = None
    """File for pairs of single tokens; None: none."""

    def __post_init__(self) -> None:
        low, high = self.rewards
        if not low < high:
            raise ConfigError(f"--rewards {low:g},{high:g}: the first must be below the second")
        if not 0 < self.precision < high - low:
            raise ConfigError(f"--precision {self.precision:g} must be above 0 and below {high - low:g}")


def parse_budget(text: str) -> int:
    """Return a number of tokens such as 500000, 500k or 2M. Raise ConfigError for anything else."""
    scale = {"k": 10**3, "m": 10**6}.get(text[-1:].lower(), 1)
    try:
        found = round(float(text if scale == 1 else text[:-1]) * scale)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"--budget {text}: write a number of tokens, such as 500k or 2M") from error
    if found < 1:
        raise ConfigError(f"--budget {text} must be at least 1 token")
    return found


def credit(request: CreditRequest, progress: Progress) -> dict[str, Any]:
    """Measure the credit of the tokens of a kept step, write it beside the step, and return it.

    Raise UserError before anything is sampled if the step or a setting cannot be used.
    """
    run, step = kept_step(request.run, request.step)
    titles = request.objectives or OBJECTIVES
    with ExitStack() as closing:
        kept = open_step(run, step, titles[0], request.answers, request.engine, progress, closing)
        objectives = Objectives(
            run,
            kept.folder,
            kept.batch,
            titles,
            engine=request.engine,
            all_needed=bool(request.objectives),
        )
        runner = closing.enter_context(asyncio.Runner())
        with progress.phase("looking at the answers", len(kept.answers), "answers"):
            cases = [
                make_case(one, kept, request.rewards, request.precision, request.longest_whole) for one in kept.answers
            ]
            runner.run(find_faults(cases, kept))
        _sample(cases, kept, request, runner, progress)
        if request.pairs is not None:
            rows = [row for case in cases if not case.fault for row in pairs_of(case, request.rewards)]
            write_text(request.pairs, "".join(json.dumps(row) + "\n" for row in rows))
            progress.say(f"{len(rows)} pairs written to {request.pairs}")
        answers = [result_of(case, kept, objectives, request.rewards) for case in cases if not case.fault]
        skipped = [{"row": case.kept.row, "sample": case.kept.sample, "reason": case.fault} for case in cases]
    result = {
        "step": step,
        "rewards": list(request.rewards),
        "answers": answers,
        "agreement": agreements(answers, list(objectives.configs)),
        "skipped": kept.skipped + [one for one in skipped if one["reason"]],
        "left_out": objectives.left_out,
    }
    write_text(kept.folder / RESULT, json.dumps(result, ensure_ascii=False) + "\n")
    return result


def _sample(
    cases: Sequence[Case], kept: KeptStep, request: CreditRequest, runner: asyncio.Runner, progress: Progress
) -> None:
    """Sample rounds until the budget is used or everything is decided; earlier rounds are read from the file."""
    usable = [n for n, case in enumerate(cases) if not case.fault]
    each = max(1, PLACES // max(1, len(usable)))
    file, used, sampled, begun = kept.folder / SAMPLES, 0, 0, time.monotonic()
    with progress.phase("continuations", request.budget, "tokens") as phase:
        earlier = _rounds(file, _key(cases, kept, request))
        while used < request.budget:
            wanted = [(n, place, number) for n in usable for place, number in cases[n].search.next(each)]
            if not wanted:
                break
            found = next(earlier, None)
            if found is None:
                found = runner.run(_round(cases, wanted, kept, request.seed))
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(found, separators=(",", ":")) + "\n")
                sampled += _num_tokens(found)
            _take(cases, wanted, found, kept, request.rewards)
            used += _num_tokens(found)
            phase.to(min(used, request.budget))
    if sampled:
        seconds = time.monotonic() - begun
        progress.say(f"{sampled} tokens sampled in {seconds:.1f} s: {sampled / seconds:.0f} tokens a second")


def _num_tokens(found: Sequence[Any]) -> int:
    return sum(len(tokens) for _, _, _, tokens, _ in found)


def _key(cases: Sequence[Case], kept: KeptStep, request: CreditRequest) -> dict[str, Any]:
    """Return everything that the rounds depend on; the budget only says how many there are."""
    return {
        "seed": request.seed,
        "rewards": list(request.rewards),
        "longest_whole": request.longest_whole,
        "precision": request.precision,
        "engine": kept.engine,
        "answers": [[case.kept.row, case.kept.sample, case.fault] for case in cases],
    }


def _rounds(file: Path, key: dict[str, Any]) -> Iterator[list[Any]]:
    """Yield the rounds in the file, which is begun if there is none. Raise UserError if its settings are others."""
    remove_incomplete_line(file)
    lines = [line for line, _ in read_lines(file)]
    if not lines:
        file.write_text(json.dumps(key) + "\n", encoding="utf-8")
        return
    try:
        first, *rounds = (json.loads(line) for line in lines)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}; remove it to start over") from error
    if first != key:
        differing = [name for name in key if not isinstance(first, dict) or first.get(name) != key[name]]
        raise UserError(
            f"{file} was begun with other settings ({', '.join(differing)}); pass those, or remove it to start over"
        )
    yield from rounds


async def _round(cases: Sequence[Case], wanted: Wanted, kept: KeptStep, seed: int) -> list[Any]:
    """Return the continuations of one round: number of the answer, place, tokens and reward of each."""
    places, tasks = list[tuple[int, Place]](), list[asyncio.Task[Continuation]]()
    for n, place, number in wanted:
        begun = cases[n].asked.get(place, 0)
        for sample in range(begun, begun + number):
            # a seed for each sample of each place, whatever else is sampled
            where = (place.at << 32) + (0 if place.token is None else place.token + 1)
            own_seed = request_seed(seed, n, sample, where)
            places.append((n, place))
            tasks.append(asyncio.create_task(_continuation(cases[n], place, kept, own_seed)))
    found = await asyncio.gather(*tasks)
    return [[n, place.at, place.token, one.tokens, one.reward] for (n, place), one in zip(places, found, strict=True)]


async def _continuation(case: Case, place: Place, kept: KeptStep, seed: int) -> Continuation:
    try:
        return await continuation(case.kept.recorded, place, kept.setting, kept.sampling, seed)
    except Diverged as error:
        where = f"row {case.kept.row}, sample {case.kept.sample}"
        raise UserError(f"{where}: {error}. It repeated the episode before; its random numbers are its own") from error


def _take(
    cases: Sequence[Case], wanted: Wanted, found: Sequence[Any], kept: KeptStep, rewards: tuple[float, float]
) -> None:
    """Give the continuations of a round to the searches."""
    low, high = rewards
    for n, place, number in wanted:
        cases[n].asked[place] = cases[n].asked.get(place, 0) + number
    for n, at, token, tokens, reward in found:
        case, place = cases[n], Place(at, token)
        if reward is not None and not low <= reward <= high:
            raise UserError(
                f"a continuation of row {case.kept.row} has the reward {reward:g}, outside --rewards {low:g},{high:g}; "
                f"pass the range of all rewards, and remove {kept.folder / SAMPLES}"
            )
        other = case.search.add(place, tokens, None if reward is None else (reward - low) / (high - low))
        if other is not None and len(examples := case.examples.setdefault(other, [])) < EXAMPLES:
            rest = tokens if other == place else tokens[other.at - at + 1 :]
            examples.append({"text": decode(kept.setting.tokenizer, rest), "reward": reward})
