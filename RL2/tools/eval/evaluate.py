"""Evaluation of a saved model on a data set: every response is stored, and interrupted evaluations resume."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

import torch
from rich.table import Table
from transformers.utils import logging as transformers_logging

from RL2.agents.make import make_agent
from RL2.agents.session import Policy
from RL2.config.agent import Agent, agent_of
from RL2.config.here import missing_packages
from RL2.config.rollout import check_weights
from RL2.config.values import Count, Index, PositiveFloat, Seed, Share
from RL2.data.prompts import load_prompts
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.errors import ConfigError, first_line, in_table, naming
from RL2.io.jsonl import read_lines, remove_incomplete_line
from RL2.models.dtypes import compute_dtype
from RL2.models.loading import weights_folder
from RL2.models.policy import load_model, load_tokenizer, max_length, stop_tokens
from RL2.rollout.continuation import decode
from RL2.rollout.environment import Environment, load_environment, without_script
from RL2.rollout.episodes import EpisodeSetting, Group, finish
from RL2.tools.eval.compare import compare
from RL2.tools.eval.intervals import Estimate, limits, over_problems
from RL2.tools.eval.samples import Sample, majority_at, pass_at
from RL2.types import Prompt, Sampling, Trajectory

SETTINGS, RECORDS, SUMMARY = "question.json", "records.jsonl", "summary.json"
WAVE = 512
"""Number of responses generated concurrently; their records are written when all are done."""
MOST = 1e100
"""Bound above any score or count of a record, so that means and variances are finite."""
BY_SCORE = "judged_by_score"
"""Key in a summary: number of samples without a reward."""
IDLE = "weights_without_part"
"""Key in a summary: weights of parts that no response has."""
UNCOUNTED = ("model", "data", "env", "agent", "agent_env", "max_running_agents", "out", "limit", "dequantize")
"""Settings of `EvalConfig` that are in a key by their content, or not at all."""
GREEDY = -1
"""Sample number of the greedy response of a problem."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `rl2 eval`, documented in its help."""

    model: str
    data: str
    env: str | None = None
    """None: with an agent alone."""
    agent: str | None = None
    agent_timeout_s: PositiveFloat = 600.0
    agent_env: tuple[str, ...] = ()
    max_running_agents: Count = 16
    dequantize: bool = False
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
        if not (self.samples or self.greedy):
            raise ConfigError("samples=0 with greedy=false leaves nothing to do")
        if self.env is None and self.agent is None:
            raise ConfigError("env= is missing: the script that scores responses; or pass agent=")
        if self.agent is None and (self.agent_timeout_s != 600 or self.max_running_agents != 16 or self.agent_env):
            raise ConfigError("agent_timeout_s, agent_env and max_running_agents have no effect without agent=")


def evaluate(
    config: EvalConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Path, dict[str, Any]]:
    """Evaluate a model and return the evaluation's folder and summary. `progress(done, total)` counts problems.

    Raise UserError before anything is generated if an input cannot be read.
    """
    transformers_logging.disable_progress_bar()
    if lacking := missing_packages({"agent": ("uvicorn", "agents", config.agent is not None)}):
        raise ConfigError(lacking[0])
    with naming("model"):
        tokenizer, longest = load_tokenizer(config.model), max_length(config.model)
    if config.env is None:
        environment = without_script(config.weights)
    else:
        environment = load_environment(config.env, config.env_timeout_s, config.weights)
    template = Template(tokenizer)
    prompts = load_prompts(config.data, tokenizer, environment.example, longest - 1, template=template)[: config.limit]
    folder = Path(config.out) / key(config, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(asdict(config), indent=1))
    done = keep_whole_problems(folder, config.samples + config.greedy)
    left = [prompt for prompt in prompts if prompt.row not in done]
    progress(len(done), len(prompts))
    if left:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with naming("model"):
            lm = load_model(config.model, compute_dtype("auto", device), config.dequantize)
            lm = lm.to(device)  # type: ignore[arg-type]
            stop = stop_tokens(lm, tokenizer, template)
        engine = EmbeddedEngine(
            lm,
            decode=lambda ids: decode(tokenizer, ids),
            max_running_requests=config.max_running_requests,
            memory_share=0.6,
        )
        policy = Policy(engine, tokenizer, template, ResponseParser(template), longest)
        player = make_agent(config, "agent", policy)
        setting = EpisodeSetting(engine, environment, tokenizer, config.max_turns, longest, template, player)
        with asyncio.Runner() as runner, ExitStack() as ends:
            if player is not None:
                ends.callback(lambda: runner.run(player.close()))
            size = max(1, WAVE // (config.samples + config.greedy))
            for start in range(0, len(left), size):
                wave = left[start : start + size]
                records = runner.run(_responses(wave, setting, config, stop, environment))
                _write(folder / RECORDS, records, "a")
                progress(len(done) + start + len(wave), len(prompts))
        engine.close()
    environment.close()
    summary = summarise(config, read(folder))
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
    return folder, summary


async def _responses(
    prompts: Sequence[Prompt],
    setting: EpisodeSetting,
    config: EvalConfig,
    stop: tuple[int, ...],
    environment: Environment,
) -> list[dict[str, Any]]:
    """Return a record of each response to each prompt."""
    sampled = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, stop_token_ids=stop)
    greedy = Sampling(config.max_new_tokens, 0.0, stop_token_ids=stop)
    groups = []
    for prompt in prompts:  # the seed depends only on the row, so a resumed run samples the same
        tasks = []
        if config.greedy:
            tasks += setting.begin(prompt, greedy, number=1, group=prompt.row, seed=config.seed)
        tasks += setting.begin(prompt, sampled, number=config.samples, group=prompt.row, seed=config.seed)
        groups.append(Group(tasks, prompt.row))
    trajectories = await finish(groups)
    size = config.samples + config.greedy
    numbers = range(GREEDY if config.greedy else 0, config.samples)
    return [_record(trajectory, numbers[n % size], environment.vote) for n, trajectory in enumerate(trajectories)]


def _record(trajectory: Trajectory, sample: int, vote: Callable[[str], str] | None) -> dict[str, Any]:
    response = trajectory.texts[-1] if trajectory.texts else ""
    # reasoning that the prompt opens is part of the response
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
        "token_ids": [sequence.token_ids.tolist() for sequence in trajectory.sequences],
        "texts": trajectory.texts,
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """Return all records of an evaluation.

    An incomplete last line is removed from the file and will be generated again.
    """
    file = folder / RECORDS
    remove_incomplete_line(file)
    records = []
    for number, (line, _) in enumerate(read_lines(file), 1):
        try:
            records.append(_validated(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number}: {first_line(error)}; remove the folder to start over") from error
    return records


def _validated(record: Any) -> dict[str, Any]:
    """Return `record` if all fields that are read later are valid. Raise ValueError otherwise."""
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
    for field_name in ("parts", "metrics"):  # records of older versions lack these fields and may lack a reward
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
    """Return the rows that have all their `size` records; remove records of other rows from the file."""
    records = read(folder)
    whole = {row for row, group in _by_row(records).items() if len(group) == size}
    if any(record["row"] not in whole for record in records):
        partial = (folder / RECORDS).with_suffix(".partial")
        _write(partial, [record for record in records if record["row"] in whole], "w")
        partial.replace(folder / RECORDS)
    return whole


def _write(file: Path, records: Sequence[dict[str, Any]], mode: str) -> None:
    with file.open(mode, encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def summarise(config: EvalConfig, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return scores with 95% intervals, lengths, and the number of unscored responses."""
    problems = _by_row(records)
    summary: dict[str, Any] = {"problems": len(problems), "unscored": sum(r["score"] is None for r in records)}

    def put(name: str, value: Estimate) -> None:
        summary[name] = value._asdict()

    bounds = limits([record["score"] for record in records if record["score"] is not None])
    greedy = {row: s.score for row, group in problems.items() for s in _scored(group, "greedy")}
    if greedy:
        values = list(greedy.values())
        put("greedy", over_problems(values, bounds=bounds))
    sampled = [samples for group in problems.values() if (samples := _scored(group, "sampled"))]
    if sampled:
        put("mean", over_problems([fmean(sample.score for sample in samples) for samples in sampled], bounds=bounds))
    has_answers = any(record["answer"] for record in records)
    for k in (k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, config.samples) if 1 < k <= config.samples):
        # problems with too few scored samples are left out, and the number of the others is reported
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
    for name, values_by_problem in parts.items():
        means = [fmean(values) for values in values_by_problem]
        if all(0 <= value <= 1 for values in values_by_problem for value in values):
            put(f"reward/{name}", over_problems(means))
        else:  # the range of such a part is unknown, and an interval needs it
            summary[f"reward/{name}"] = fmean(means)
    for name, values_by_problem in _by_problem(responses, "metrics").items():
        summary[f"env/{name}"] = fmean(fmean(values) for values in values_by_problem)
    if idle := sorted(config.weights.keys() - parts.keys()):
        summary[IDLE] = idle
    for name in ("greedy", "sampled"):
        if chosen := _which(records, name):
            summary[f"{name}_length"] = fmean(record["tokens"] for record in chosen)
            summary[f"{name}_truncated"] = fmean(record["truncated"] for record in chosen)
    return summary


def _by_problem(records: Sequence[dict[str, Any]], field_name: str) -> dict[str, list[list[float]]]:
    """Return name -> values in a field of `records`, in a list for each problem that has it."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, value in record.get(field_name, {}).items():
            found[name][record["row"]].append(value)
    return {name: list(by_row.values()) for name, by_row in sorted(found.items())}


def table(summary: dict[str, Any]) -> Table:
    """Return a table of a summary."""
    shown = Table(title=f"{summary['problems']} problems, {summary['unscored']} responses unscored")
    if by_score := summary.get(BY_SCORE):
        shown.caption = (
            f"{by_score} samples of an older version of RL2 have no reward: pass@k takes a score above 0 as right; "
            "remove the folder to sample again"
        )
    if idle := summary.get(IDLE):
        shown.caption = f"{', '.join(f'weights.{name}' for name in idle)} match no part of any reward"
    for heading in ("", "value", "95% interval"):
        shown.add_column(heading)
    for name, value in summary.items():
        if isinstance(value, dict):
            shown.add_row(in_table(name), f"{value['value']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}")
        elif name not in ("problems", "unscored", BY_SCORE, IDLE):
            shown.add_row(in_table(name), f"{value:.4g}", "")
    return shown


def compared(methods: Sequence[str], by: str) -> list[str]:
    """Compare methods (NAME=FOLDER[,FOLDER...]) with the first and return a line for each."""
    if by not in ("greedy", "sampled"):
        raise ConfigError(f"--by {by}: choose greedy or sampled")
    if len(methods) < 2:
        raise ConfigError("nothing to compare with: pass at least two methods, NAME=FOLDER[,FOLDER...]")
    runs: dict[str, list[dict[str, float]]] = {}
    read_folders: list[str] = []
    for number, method in enumerate(methods):
        name, equals, folders = method.partition("=")
        if not equals:
            name, folders = method, method
        for folder in folders.split(","):
            run = scores(read(Path(folder)), by)
            if not run:
                raise ConfigError(f"{folder} has no {by} scores: pass the folder of an evaluation with such responses")
            runs.setdefault(name, []).append(run)
            read_folders.append(folder)
        if len(runs) != number + 1:
            raise ConfigError(f"{name} is named twice")
    _refuse_other_problems(read_folders)
    (first, baseline), *others = runs.items()
    means = ", ".join(f"{fmean(run.values()):.4f}" for run in baseline)
    lines = [f"{first}: {by} score {means}"]
    for name, other_runs in others:
        try:
            comparison = compare(baseline, other_runs)
        except ValueError as error:
            raise ConfigError(f"{first} and {name}: {error}") from error
        means = ", ".join(f"{fmean(run.values()):.4f}" for run in other_runs)
        line = f"{name}: {by} score {means}; against {first} {comparison.words}"
        if missing := len(set[str]().union(*baseline, *other_runs)) - comparison.problems:
            line += f"; {missing} problems have no score in some of these runs, so the difference excludes them"
        lines.append(line)
    return lines


def _refuse_other_problems(folders: Sequence[str]) -> None:
    """Raise ConfigError if evaluations differ in data or environment: they are compared row by row.

    Files with the same content count as the same. A folder without question.json is not checked.
    """
    asked: list[tuple[str, dict[str, Any]]] = []
    for folder in folders:
        file = Path(folder) / SETTINGS
        if file.exists():
            try:
                asked.append((folder, dict(json.loads(file.read_bytes()))))
            except (ValueError, TypeError, RecursionError) as error:
                raise ConfigError(f"{file} is damaged: {first_line(error)}; evaluate again") from error
    for folder, config in asked[1:]:
        base, expected = asked[0]
        for name in ("data", "env"):
            if not _same_file(str(config.get(name)), str(expected.get(name))):
                raise ConfigError(
                    f"{folder} has {name}={config.get(name)} and {base} has {name}={expected.get(name)}; "
                    "compare evaluations with the same problems and environment"
                )


def _same_file(a: str, b: str) -> bool:
    return a == b or (Path(a).is_file() and Path(b).is_file() and Path(a).read_bytes() == Path(b).read_bytes())


def scores(records: Sequence[dict[str, Any]], which: str) -> dict[str, float]:
    """Return problem -> score, greedy or the mean of the sampled; only problems with a scored response."""
    return {
        f"{row}": fmean(sample.score for sample in samples)
        for row, group in _by_row(records).items()
        if (samples := _scored(group, which))
    }


def key(config: EvalConfig, prompts: Sequence[Prompt]) -> str:
    """Return a name that changes with the weights, the tokenizer, the problems, the environment and the sampling."""
    digest = hashlib.sha256()
    with naming("model"):
        folder = weights_folder(config.model)
    for file in sorted(folder.glob("*")):
        if file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    if config.env is not None:
        digest.update(Path(config.env).read_bytes())
    if config.agent is not None:
        digest.update(_content(agent_of("agent", config.agent)))
    for prompt in prompts:
        digest.update(json.dumps([prompt.row, prompt.token_ids, prompt.extra_info], default=str).encode())
    sampling = {k: v for k, v in asdict(config).items() if k not in UNCOUNTED}
    if not config.weights:  # evaluations older than these settings keep their name
        del sampling["weights"]
    if config.agent is None:
        del sampling["agent_timeout_s"]
    digest.update(json.dumps(sampling, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _content(agent: Agent) -> bytes:
    """Return what an agent is: its function and file, or its words with the files that they name."""
    words = [agent.function.rpartition(":")[2], str(agent.file)] if agent.function is not None else agent.words[1:]
    files = (Path(word) for word in words)
    return b"\0".join(file.read_bytes() if file.is_file() else str(file).encode() for file in files)


def _by_row(records: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[record["row"]].append(record)
    return rows


def _which(records: Sequence[dict[str, Any]], which: str) -> list[dict[str, Any]]:
    """Return the greedy records, or the sampled ones."""
    return [record for record in records if (record["sample"] == GREEDY) == (which == "greedy")]


def _scored(records: Sequence[dict[str, Any]], which: str) -> list[Sample]:
    return [Sample(r["score"], r["answer"], r.get("reward")) for r in _which(records, which) if r["score"] is not None]
