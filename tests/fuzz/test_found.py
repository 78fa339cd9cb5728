"""What the fuzzers have found, each by itself and as small as it gets."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import yaml
from test_records import METRICS, RECORD, REPLAY, run_folder
from test_scripts import SCRIPT
from test_served import SGLANG, VLLM
from test_settings import needed
from transformers import PreTrainedTokenizerBase

from RL2.config.load import load, show
from RL2.config.programs import RLConfig
from RL2.config.values import build
from RL2.data.chat import render
from RL2.data.curriculum import Curriculum
from RL2.data.cursor import Cursor
from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.data.source import DataError, load_rows
from RL2.data.template import Template
from RL2.data.watchdog import Watchdog
from RL2.engines.scripted import ScriptedEngine
from RL2.engines.served.client import ServerError
from RL2.engines.sglang.client import SGLangClient
from RL2.engines.vllm.client import VLLMClient
from RL2.errors import ConfigError, UserError
from RL2.io import checkpoint
from RL2.io.checkpoint import NOTES
from RL2.io.report import Report, read_metrics
from RL2.rollout.environment import load_environment
from RL2.rollout.episode import run_episode
from RL2.tools import sweep
from RL2.tools.eval.evaluate import RECORDS, EvalConfig, compared, read, summarise
from RL2.tools.plan.command import PlanRequest
from RL2.tools.replay import run_config
from RL2.tools.settings import parse_settings
from RL2.tools.view.run_index import RunIndex
from RL2.trainer.run import LAUNCHERS, begun_by
from RL2.types import Prompt, Sampling

# rows


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"a": ' + "9" * 5000 + "}\n", r"row 1 \(line 1\): a number has too many digits"),
        ('{"a": 1}\n' + "[" * 20_000 + "\n", r"row 2 \(line 2\): lists or objects are nested too deeply"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_json_beyond_what_python_reads(kind: str, text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_text(text if kind == "jsonl" else "[" + ",\n".join(text.splitlines()) + "]")
    with pytest.raises(DataError, match=error):
        load_rows(str(file))


def test_a_cell_of_a_table_beyond_what_python_reads_is_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (file := tmp_path / "a.csv").write_text("prompt,extra_info\na," + "[" * 20_000 + "\n")
    with pytest.raises(DataError, match="row 1: 'extra_info' must be an object"):
        load_prompts(str(file), tokenizer, None, 100)


def test_lengths_beyond_the_end_of_an_arrow_file(tmp_path: Path) -> None:
    """Reading them ended the process."""
    table, file = pa.table({"a": ["some", "texts"]}), tmp_path / "a.arrow"
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    data = file.read_bytes()
    ends = struct.pack("<3i", 0, 4, 9)  # where the texts begin and end
    assert data.count(ends) == 1
    file.write_bytes(data.replace(ends, struct.pack("<3i", 0, 4, 2**31 - 1)))
    with pytest.raises(DataError, match=r"a\.arrow: "):
        load_rows(str(file))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "\ud800", "response": "a"},
        {"prompt": "a", "response": "\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}], "response": "a"},
    ],
)
def test_half_of_a_surrogate_pair_is_no_text(
    row: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (file := tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"row 1: .* has half of a surrogate pair at character"):
        load_examples(str(file), tokenizer, None, 100)


def test_errors_that_quote_keys_are_one_line(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (file := tmp_path / "a.jsonl").write_text('{"a\\nb\u2028c\\ud800": 1}')
    with pytest.raises(DataError) as raised:
        load_prompts(str(file), tokenizer, None, 100)
    assert r"its keys are a b c\ud800;" in str(raised.value)


@pytest.mark.parametrize(
    "template",
    ["{{ 1 / 0 }}", "{% for a in b %}" * 30 + "{% endfor %}" * 30, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_a_template_that_fails_in_its_own_way(
    template: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match="the chat template refuses the messages"):
        render(tokenizer, [{"role": "user", "content": "a"}], Watchdog(10, ""), add_generation_prompt=True)


def test_a_template_that_never_ends_is_interrupted(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    monkeypatch.setattr(tokenizer, "chat_template", loops)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"it takes longer than 0\.2 s"):
        Template(tokenizer, limit_s=0.2)
    assert time.monotonic() - begun < 10
    time.sleep(0.3)  # nothing is thrown into what comes after


# settings


@pytest.mark.parametrize("override", ["a" * 5000, "trainer.project=${trainer.project}", f"trainer.seed={2**63}"])
def test_overrides_that_hydra_does_not_catch(override: str) -> None:
    with pytest.raises(ConfigError):
        load("spo", [*needed("spo"), override])


def test_keys_that_are_no_texts_and_numbers_that_are_no_floats() -> None:
    tree = yaml.safe_load(show(load("spo", needed("spo"))))
    with pytest.raises(ConfigError, match=r"nothing reads actor\.1, actor\.a"):
        build(RLConfig, tree | {"actor": tree["actor"] | {1: 2, "a": 3}}, "")
    with pytest.raises(ConfigError, match=r"actor\.lr=inf; expected a finite number"):
        build(RLConfig, tree | {"actor": tree["actor"] | {"lr": 10**400}}, "")


@pytest.mark.parametrize("settings", [EvalConfig, PlanRequest])
def test_settings_that_are_no_yaml(settings: type) -> None:
    with pytest.raises(ConfigError, match=r"model=\[: "):
        parse_settings(settings, ["model=["])


def test_a_plan_of_no_number() -> None:
    with pytest.raises(ConfigError, match="memory_gib=nan; expected a finite number"):
        parse_settings(PlanRequest, ["model=Qwen/Qwen3-4B", "gpus=8", "memory_gib=.nan"])


@pytest.mark.parametrize("data", [b"\xff", b"[" * 5000])
def test_a_sweep_that_is_no_yaml(data: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "sweep.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: "):
        sweep.read(file, 1, tmp_path)


# environments


class NoNumber(float):
    def __float__(self) -> float:
        raise RuntimeError("no")


RESULT = {"next_state": "", "reward": 1.0, "score": 1.0, "done": False, "extra_info": {}}


@pytest.mark.parametrize(
    ("answers", "text", "cause"),
    [
        ([""], "", "the environment gave an empty state"),
        ([RESULT], "a", "the environment gave an empty state"),
        ([RESULT | {"next_state": "\ud800"}], "a", "the environment's state has half of a surrogate pair"),
        ([RESULT | {"reward": NoNumber(1)}], "a", "step returned reward=inf"),
        ([ValueError("\ud800\nb")], "a", r"ValueError: \ud800"),
    ],
)
def test_environments_end_no_run(
    answers: list[Any], text: str, cause: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (path := tmp_path / "env.py").write_text(SCRIPT)
    environment = load_environment(path, 5)
    trajectory = asyncio.run(
        run_episode(
            Prompt(0, text, tokenizer.encode(text), {"answers": answers}),
            engine=ScriptedEngine(lambda ids, sampling: [7, 8]),
            environment=environment,
            tokenizer=tokenizer,
            sampling=Sampling(4),
            max_turns=2,
            max_length=None,
            group=0,
            sample=0,
            seed=0,
        )
    )
    environment.close()
    assert trajectory.unscored is not None and cause in trajectory.unscored
    assert all(sequence.token_ids.tolist() for sequence in trajectory.sequences)
    Report(tmp_path, True, 1).samples(0, "train", [trajectory])


# servers


def sglang(**changes: Any) -> dict[str, Any]:
    meta = SGLANG["meta_info"]
    assert isinstance(meta, dict)
    return {"output_ids": changes.pop("output_ids", SGLANG["output_ids"]), "meta_info": meta | changes}


LONG_SPAN = [{"version": "4", "start": 0, "end": 10**12}]
UNASKED = {"type": "stop", "matched": 99}


@pytest.mark.parametrize(
    ("kind", "answer", "error"),
    [
        (VLLMClient, None, "unexpected response format"),
        (VLLMClient, {"choices": [{**VLLM["choices"][0], "weight_versions": LONG_SPAN}]}, "came with versions of"),
        (SGLangClient, {"output_ids": [7]}, "unexpected response format"),
        (SGLangClient, sglang(weight_versions=LONG_SPAN), "came with versions of 1000000000000"),
        (SGLangClient, sglang(output_token_logprobs=[["a", 7, None], [-1, 8, None]]), "lacks a finite log-probability"),
        (SGLangClient, sglang(finish_reason={"type": []}), r"ended with \[\]"),
        (
            SGLangClient,  # which asks for the rest until nothing is left
            sglang(output_ids=[], output_token_logprobs=[], weight_versions=[], finish_reason=UNASKED),
            "has 0 tokens; expected 1 to 2",
        ),
        (
            SGLangClient,
            sglang(
                output_ids=[7] * 3,
                output_token_logprobs=[[-1, 7, None]] * 3,
                weight_versions=[{"version": "4", "start": 0, "end": 3}],
                finish_reason=UNASKED,
            ),
            "has 3 tokens; expected 1 to 2",
        ),
    ],
)
def test_answers_of_another_form(kind: Any, answer: Any, error: str) -> None:
    async def ask() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=json.dumps(answer)))
        async with httpx.AsyncClient(transport=transport) as http:
            await kind("http://server", "").generate(http, [5, 6], Sampling(2), 1)

    with pytest.raises(ServerError, match=error):
        asyncio.run(ask())


def test_metrics_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "vllm:request_queue_time_seconds_sum 1.5x\nvllm:request_queue_time_seconds_count 3\n"
    monkeypatch.setattr(httpx, "get", lambda *args, **of: httpx.Response(200, text=text))
    with pytest.raises(ServerError, match="/metrics: unexpected response format"):
        VLLMClient("http://server", "").queue_times()


# records


@pytest.mark.parametrize("line", ["[" * 20_000, "1", "{}", '{"row": "a"}'])
def test_a_record_that_is_none(line: str, tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"records\.jsonl, line 1: .*; remove the folder to start over"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"records\.jsonl, line 1"):
        compared([f"a={tmp_path}", f"b={tmp_path}"], "greedy")


def test_scores_that_are_no_shares(tmp_path: Path) -> None:
    """An environment may give any; a few problems, all of the same score, and many."""
    question = EvalConfig(model="m", data="d", env="e", samples=1)
    for scores in ([2.0], [2.0] * 5, [-1.0, 0.0, 3.0, 2.0]):
        places = [(row, sample, score) for row, score in enumerate(scores) for sample in (-1, 0)]
        records = [RECORD | {"row": row, "sample": sample, "score": score} for row, sample, score in places]
        summary = summarise(question, records)
        for name in ("greedy", "mean"):
            of = summary[name]
            assert of["value"] == pytest.approx(sum(scores) / len(scores))
            assert of["low"] <= of["value"] <= of["high"]
        assert len(scores) < 4 or min(scores) == max(scores) or summary["mean"]["high"] > 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b"[1]\n"),
        ("samples.jsonl", b'{"step": 0}\n'),
        ("samples.jsonl", b"[" * 20_000 + b"\n"),
        ("config.yaml", b"\xff"),
        ("config.yaml", b"[1]"),
        ("config.yaml", b"trainer: 1"),
        ("config.yaml", b"a: &a [1]\nb: [*a, *a]"),
        ("tokens/000000_train.parquet", b"PAR1"),
        ("replay_000000/replay.json", b"{}"),
        ("replay_000000/batch.safetensors", b""),
    ],
)
def test_pages_of_damaged_runs(name: str, content: bytes, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.").replace("batch", ".*").split("/")[0]):
        list(RunIndex([str(folder)]).chunks())


def test_half_of_a_surrogate_pair_or_no_number_in_a_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(json.dumps(METRICS[0] | {"a\ud800": 1, "train/score": 10**400}) + "\n")
    (folder / "replay_000000" / "replay.json").write_text(json.dumps(REPLAY).replace('"norm": 1.0', '"norm": NaN'))
    assert len(list(RunIndex([str(folder)]).chunks())) == 3


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"step": "1"}\n'])
def test_a_run_does_not_go_on_from_damaged_metrics(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        Report(tmp_path, True, 1).keep_before(1)


@pytest.mark.parametrize("title", ["spo 'x", "spo actor.clip=[", "spo actor.lora=1"])
def test_titles_that_are_none(title: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with pytest.raises(UserError):
        run_config(folder, folder / "replay_000000", title)


# checkpoints


def test_folders_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    for name in ("step_9", "step_000010", "step_x", "step_11a", "step_000012.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / NOTES).write_text("{}")
    assert checkpoint.candidates("latest", tmp_path) == [tmp_path / "step_000010", tmp_path / "step_9"]
    checkpoint.set_aside_after(tmp_path, 9)
    checkpoint.prune(tmp_path, 1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_9", "step_000010.superseded", "step_x", "step_11a"}


def test_a_position_that_is_none(tmp_path: Path) -> None:
    cursor, curriculum = Cursor(10, 4, 0), Curriculum(10, 4, 0, "failures")
    for drawn in (-1, 1.5, "1", None, True):
        with pytest.raises(ValueError, match="its position in the data"):
            cursor.load_state_dict(cursor.state_dict() | {"drawn": drawn})
    for rates in ({"10": 0.5}, {"1": 2}, {"a": 0.5}, [1]):
        with pytest.raises(ValueError, match="its success rates do not"):
            curriculum.load_state_dict(curriculum.state_dict() | {"rates": rates})


def test_a_damaged_list_of_launchers(tmp_path: Path) -> None:
    for text in ("[", "1", "[[]]"):
        (tmp_path / LAUNCHERS).write_text(text)
        assert not begun_by(["a"], tmp_path)
