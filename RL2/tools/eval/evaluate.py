"""A saved model on a data set: every response kept, what was interrupted goes on, what is done is read back."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

import torch
from rich.table import Table
from transformers.utils import logging as transformers_logging

from RL2.config.load import words
from RL2.config.rollout import check_weights
from RL2.config.values import Count, Index, PositiveFloat, Seed, Share, build, needs_value
from RL2.data.prompts import load_prompts
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError, first_line, in_table
from RL2.models.dtypes import compute_dtype
from RL2.models.loading import weights_folder
from RL2.models.policy import load_model, load_tokenizer, max_length, stop_tokens
from RL2.rollout.collect import Episodes, Group, finish
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.episode import decode
from RL2.tools.eval.compare import compare
from RL2.tools.eval.intervals import Estimate, limits, over_problems
from RL2.tools.eval.samples import Sample, majority_at, pass_at
from RL2.types import Prompt, Sampling, Trajectory

QUESTION, RECORDS, SUMMARY = "question.json", "records.jsonl", "summary.json"
WAVE = 512
"""Responses that are at work together; their records are written when all are done."""
MOST = 1e100
"""More than any score or count of a record: means and variances of such are finite."""
BY_SCORE = "judged_by_score"
"""Number of samples that have no reward, in a summary."""
IDLE = "weights_without_part"
"""Weights of parts that no response has, in a summary."""
GREEDY = -1
"""Number of the greedy response among the samples of a problem."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The settings of `rl2 eval`, which says what they mean."""

    model: str
    data: str
    env: str
    samples: Index = 0
    greedy: bool = True
    temperature: PositiveFloat = 1.0
    top_p: Share = 1.0
    top_k: Index = 0
    max_new_tokens: Count = 1024
    max_turns: Count = 1
    limit: Count | None = None
    seed: Seed = 0
    out: str = "evals"
    env_timeout_s: PositiveFloat = 60.0
    max_running_requests: Count = 256
    weights: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weights(self.weights, "weights")

    @staticmethod
    def of(settings: Sequence[str]) -> EvalConfig:
        """Of `key=value` words. Raises ConfigError for one that is not there or no sensible value."""
        given = words(settings)
        if missing := [f.name for f in fields(EvalConfig) if needs_value(f) and f.name not in given]:
            raise ConfigError(f"{missing[0]}= is missing")
        question: EvalConfig = build(EvalConfig, given, "")
        if not (question.samples or question.greedy):
            raise ConfigError("samples=0 with greedy=false leaves nothing to do")
        return question


def evaluate(
    question: EvalConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Path, dict[str, Any]]:
    """The folder of the evaluation, and its summary. `progress(done, total)` counts problems.

    Raises a UserError before anything is generated for what cannot be read.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(question.model, "model")
    environment = load_environment(question.env, question.env_timeout_s, question.weights)
    longest = max_length(question.model)
    prompts = load_prompts(question.data, tokenizer, environment.example, longest - 1)[: question.limit]
    folder = Path(question.out) / key(question, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUESTION).write_text(json.dumps(asdict(question), indent=1))
    done = keep_whole_problems(folder, question.samples + question.greedy)
    left = [prompt for prompt in prompts if prompt.row not in done]
    progress(len(done), len(prompts))
    if left:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        lm = load_model(question.model, compute_dtype("auto", device), "model").to(device)  # type: ignore[arg-type]
        engine = EmbeddedEngine(
            lm,
            decode=lambda ids: decode(tokenizer, ids),
            max_running_requests=question.max_running_requests,
            memory_share=0.6,
        )
        episodes = Episodes(engine, environment, tokenizer, question.max_turns, longest)
        stop = stop_tokens(lm, tokenizer, "model")
        with asyncio.Runner() as runner:
            size = max(1, WAVE // (question.samples + question.greedy))
            for start in range(0, len(left), size):
                wave = left[start : start + size]
                records = runner.run(_responses(wave, episodes, question, stop, environment))
                _write(folder / RECORDS, records, "a")
                progress(len(done) + start + len(wave), len(prompts))
        engine.close()
    environment.close()
    summary = summarise(question, read(folder))
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
    return folder, summary


async def _responses(
    prompts: Sequence[Prompt], episodes: Episodes, question: EvalConfig, stop: tuple[int, ...], environment: Environment
) -> list[dict[str, Any]]:
    """A record of each response to each prompt."""
    sampled = Sampling(
        question.max_new_tokens, question.temperature, question.top_p, question.top_k, stop_token_ids=stop
    )
    greedy = Sampling(question.max_new_tokens, 0.0, stop_token_ids=stop)
    groups = []
    for prompt in prompts:  # the seed hangs on the row alone, whatever was done before
        tasks = []
        if question.greedy:
            tasks += episodes.begin(prompt, greedy, number=1, group=prompt.row, seed=question.seed)
        tasks += episodes.begin(prompt, sampled, number=question.samples, group=prompt.row, seed=question.seed)
        groups.append(Group(tasks, prompt.row))
    trajectories = await finish(groups)
    size = question.samples + question.greedy
    numbers = range(GREEDY if question.greedy else 0, question.samples)
    return [_record(trajectory, numbers[n % size], environment.vote) for n, trajectory in enumerate(trajectories)]


def _record(trajectory: Trajectory, sample: int, vote: Callable[[str], str] | None) -> dict[str, Any]:
    response = trajectory.texts[-1] if trajectory.texts else ""
    # reasoning that the prompt opens is a part of the response
    opened = "<think>" if trajectory.texts and trajectory.texts[-2].rstrip().endswith("<think>") else ""
    given = vote(opened + response) if vote is not None and trajectory.unscored is None else ""
    return {
        "row": trajectory.row,
        "sample": sample,
        "score": None if trajectory.unscored is not None else trajectory.score,
        "reward": None if trajectory.unscored is not None else trajectory.reward,
        "parts": trajectory.parts,
        "metrics": trajectory.metrics,
        "answer": given or None,
        "tokens": trajectory.num_tokens,
        "truncated": trajectory.truncated,
        "unscored": trajectory.unscored,
        "token_ids": [sequence.token_ids for sequence in trajectory.sequences],
        "texts": trajectory.texts,
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of an evaluation; a last line that was cut off is removed from the file, so that it is made again."""
    file = folder / RECORDS
    if not file.exists():
        return []
    whole = file.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        file.write_bytes(kept)
    records = []
    # not str.splitlines: a text may hold other characters that end a line, which JSON leaves as they are
    for number, line in enumerate(kept.splitlines(), 1):
        try:
            records.append(_whole(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: {first_line(error)}; remove the folder to begin anew") from error
    return records


def _whole(record: Any) -> dict[str, Any]:
    """`record`, with everything in it that is read again. Raises ValueError."""
    wanted: dict[str, tuple[type, ...]] = {
        "row": (int,),
        "sample": (int,),
        "score": (int, float, NoneType),
        "answer": (str, NoneType),
        "tokens": (int,),
        "truncated": (bool,),
    }
    if not isinstance(record, dict):
        raise ValueError("not a record of a response")
    for field_name in ("parts", "metrics"):  # records of older versions have none, and may have no reward
        named = record.get(field_name, {})
        if not isinstance(named, dict) or not all(type(value) in (int, float) for value in named.values()):
            raise ValueError(f"not a record of a response: it has no {field_name} as `rl2 eval` writes them")
    if "reward" in record:
        wanted["reward"] = wanted["score"]
    for name, types in wanted.items():
        value = record.get(name, ...)
        if type(value) not in types or (isinstance(value, int | float) and not -MOST < value < MOST):
            raise ValueError(f"not a record of a response: it has no {name} as `rl2 eval` writes it")
    return record


def keep_whole_problems(folder: Path, size: int) -> set[int]:
    """Rows that have all their `size` records; those of others, which an interruption left, are removed."""
    records = read(folder)
    whole = {row for row, of in _by_row(records).items() if len(of) == size}
    if any(record["row"] not in whole for record in records):
        partial = (folder / RECORDS).with_suffix(".partial")
        _write(partial, [record for record in records if record["row"] in whole], "w")
        partial.replace(folder / RECORDS)
    return whole


def _write(file: Path, records: Sequence[dict[str, Any]], mode: str) -> None:
    with file.open(mode, encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def summarise(question: EvalConfig, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores with their 95% intervals, lengths, and what could not be scored."""
    problems = _by_row(records)
    summary: dict[str, Any] = {"problems": len(problems), "unscored": sum(r["score"] is None for r in records)}

    def put(name: str, value: Estimate) -> None:
        summary[name] = value._asdict()

    bounds = limits([record["score"] for record in records if record["score"] is not None])
    greedy = {row: s.score for row, of in problems.items() for s in _scored(of, "greedy")}
    if greedy:
        values = list(greedy.values())
        put("greedy", over_problems(values, bounds=bounds))
    sampled = [samples for of in problems.values() if (samples := _scored(of, "sampled"))]
    if sampled:
        put("mean", over_problems([fmean(sample.score for sample in samples) for samples in sampled], bounds=bounds))
    has_answers = any(record["answer"] for record in records)
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, question.samples) if 1 < k <= question.samples):
        # problems that lack scored samples are left out, and how many were there is said
        enough = [samples for samples in sampled if len(samples) >= k]
        if enough:
            put(f"pass@{k}", over_problems([pass_at(k, samples) for samples in enough]))
            if has_answers:
                put(f"maj@{k}", over_problems([majority_at(k, samples) for samples in enough], bounds=bounds))
        if len(enough) < len(problems):
            summary[f"problems@{k}"] = len(enough)
    if by_score := sum(sample.reward is None for samples in sampled for sample in samples):
        summary[BY_SCORE] = by_score
    responses = _which(records, "sampled" if sampled else "greedy")
    parts = _by_problem(responses, "parts")
    for name, of_problems in parts.items():
        values = [fmean(of) for of in of_problems]
        if all(0 <= value <= 1 for of in of_problems for value in of):
            put(f"reward/{name}", over_problems(values))
        else:  # what such a part can be is not known, and an interval needs it
            summary[f"reward/{name}"] = fmean(values)
    for name, of_problems in _by_problem(responses, "metrics").items():
        summary[f"env/{name}"] = fmean(fmean(of) for of in of_problems)
    if idle := sorted(question.weights.keys() - parts.keys()):
        summary[IDLE] = idle
    for name in ("greedy", "sampled"):
        if chosen := _which(records, name):
            summary[f"{name}_length"] = fmean(record["tokens"] for record in chosen)
            summary[f"{name}_truncated"] = fmean(record["truncated"] for record in chosen)
    return summary


def _by_problem(records: Sequence[dict[str, Any]], field_name: str) -> dict[str, list[list[float]]]:
    """Return name -> its values in a field of `records`, in a list for each problem that has it."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, value in record.get(field_name, {}).items():
            found[name][record["row"]].append(value)
    return {name: list(of.values()) for name, of in sorted(found.items())}


def table(summary: dict[str, Any]) -> Table:
    """Return a summary, to read."""
    shown = Table(title=f"{summary['problems']} problems, {summary['unscored']} responses unscored")
    if by_score := summary.get(BY_SCORE):
        shown.caption = (
            f"{by_score} samples of an older version of RL2 have no reward: pass@k takes a score above 0 as right; "
            "remove the folder to sample anew"
        )
    if idle := summary.get(IDLE):
        shown.caption = f"{', '.join(f'weights.{name}' for name in idle)} weighs no part of any reward"
    for heading in ("", "value", "95% interval"):
        shown.add_column(heading)
    for name, value in summary.items():
        if isinstance(value, dict):
            shown.add_row(in_table(name), f"{value['value']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}")
        elif name not in ("problems", "unscored", BY_SCORE, IDLE):
            shown.add_row(in_table(name), f"{value:.4g}", "")
    return shown


def compared(methods: Sequence[str], by: str) -> list[str]:
    """A line for each of `methods` (NAME=FOLDER[,FOLDER...]) after the first, which it is compared with."""
    if by not in ("greedy", "sampled"):
        raise ConfigError(f"--by {by}: choose greedy or sampled")
    if len(methods) < 2:
        raise ConfigError("there is nothing to compare with: give two methods at least, NAME=FOLDER[,FOLDER...]")
    runs: dict[str, list[dict[str, float]]] = {}
    read_folders: list[str] = []
    for number, method in enumerate(methods):
        name, equals, folders = method.partition("=")
        if not equals:
            name, folders = method, method
        for folder in folders.split(","):
            of = scores(read(Path(folder)), by)
            if not of:
                raise ConfigError(
                    f"{folder} has no {by} scores: it is not the folder of an evaluation with such responses"
                )
            runs.setdefault(name, []).append(of)
            read_folders.append(folder)
        if len(runs) != number + 1:
            raise ConfigError(f"{name} is named twice")
    _refuse_other_problems(read_folders)
    (first, baseline), *others = runs.items()
    means = ", ".join(f"{fmean(run.values()):.4f}" for run in baseline)
    lines = [f"{first}: {by} score {means}"]
    for name, others_of in others:
        try:
            comparison = compare(baseline, others_of)
        except ValueError as error:
            raise ConfigError(f"{first} and {name}: {error}") from error
        means = ", ".join(f"{fmean(run.values()):.4f}" for run in others_of)
        line = f"{name}: {by} score {means}; against {first} {comparison.words}"
        if missing := len(set[str]().union(*baseline, *others_of)) - comparison.problems:
            line += f"; {missing} problems have no score in some of these runs, and the difference leaves them out"
        lines.append(line)
    return lines


def _refuse_other_problems(folders: Sequence[str]) -> None:
    """Raise ConfigError if evaluations differ in data or environment: they are compared row by row.

    Two files are the same if they hold the same. A folder without question.json is taken as it is.
    """
    asked: list[tuple[str, dict[str, Any]]] = []
    for folder in folders:
        file = Path(folder) / QUESTION
        if file.exists():
            try:
                asked.append((folder, dict(json.loads(file.read_bytes()))))
            except (ValueError, TypeError, RecursionError) as error:
                raise ConfigError(f"{file} is damaged: {first_line(error)}; give the evaluation again") from error
    for folder, question in asked[1:]:
        base, expected = asked[0]
        for name in ("data", "env"):
            if not _same_file(str(question.get(name)), str(expected.get(name))):
                raise ConfigError(
                    f"{folder} has {name}={question.get(name)} and {base} has {name}={expected.get(name)}; "
                    "compare evaluations of the same problems by the same environment"
                )


def _same_file(a: str, b: str) -> bool:
    return a == b or (Path(a).is_file() and Path(b).is_file() and Path(a).read_bytes() == Path(b).read_bytes())


def scores(records: Sequence[dict[str, Any]], which: str) -> dict[str, float]:
    """Problem -> score: the greedy one, or the mean of the `sampled`; only problems with a scored response."""
    return {
        f"{row}": fmean(sample.score for sample in samples)
        for row, of in _by_row(records).items()
        if (samples := _scored(of, which))
    }


def key(question: EvalConfig, prompts: Sequence[Prompt]) -> str:
    """A name that changes with the weights, the tokenizer, the problems, the environment and the sampling."""
    digest = hashlib.sha256()
    folder = weights_folder(question.model, "model")
    for file in sorted(folder.glob("*")):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    digest.update(Path(question.env).read_bytes())
    for prompt in prompts:
        digest.update(json.dumps([prompt.row, prompt.token_ids, prompt.extra_info], default=str).encode())
    sampling = {k: v for k, v in asdict(question).items() if k not in ("model", "data", "env", "out", "limit")}
    if not question.weights:  # evaluations from before there were weights are found again
        del sampling["weights"]
    digest.update(json.dumps(sampling, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _by_row(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[record["row"]].append(record)
    return rows


def _which(records: Sequence[dict[str, Any]], which: str) -> list[dict[str, Any]]:
    """The greedy ones, or the `sampled`."""
    return [record for record in records if (record["sample"] == GREEDY) == (which == "greedy")]


def _scored(records: Sequence[dict[str, Any]], which: str) -> list[Sample]:
    return [Sample(r["score"], r["answer"], r.get("reward")) for r in _which(records, which) if r["score"] is not None]
