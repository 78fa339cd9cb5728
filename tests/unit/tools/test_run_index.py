"""What `rl2 view` reads of runs and packs for a browser."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from RL2.errors import UserError
from RL2.io.report import Report
from RL2.types import Sequence, Trajectory

pytest.importorskip("plotly")

from RL2.tools.view.page import Server, render
from RL2.tools.view.run_index import CHUNK, LONGEST, RunIndex


def unpacked(chunk: str) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(chunk), -15))


def head(book: RunIndex) -> Any:
    return unpacked(book.head())


def run(folder: Path, *, seed: int = 0, objective: str = "spo", recorded: int = 10) -> Report:
    folder.mkdir(parents=True)
    trainer = f"{{seed: {seed}, save_dir: {folder}, token_stats_freq: {recorded}}}"
    (folder / "config.yaml").write_text(f"actor: {{objective: {objective}}}\ntrainer: {trainer}\n")
    report = Report(folder, is_first=True, num_steps=9)
    report.step(0, {"train/score": 0.5})
    return report


def trajectory(row: int, text: str, reward: float = 1.0) -> Trajectory:
    sequence = Sequence([1, 2, 3], [False, True, True], [0.0] * 3, [0.0, 0.0, reward])
    return Trajectory(row, group=row, sample=0, sequences=[sequence], texts=["Q", text], score=reward)


def test_runs_that_differ_in_their_seed_are_one_method(tmp_path: Path) -> None:
    run(tmp_path / "spo-0"), run(tmp_path / "spo-1", seed=1, recorded=5), run(tmp_path / "ppo", objective="ppo")
    found = head(RunIndex([str(tmp_path / name) for name in ("spo-0", "ppo", "spo-1")]))
    assert found["methods"] == ["spo", "ppo"]
    assert [(one["name"], one["method"]) for one in found["runs"]] == [("spo-0", 0), ("spo-1", 0), ("ppo", 1)]
    assert found["settings"]["actor.objective"] == ["spo", "spo", "ppo"]
    assert "trainer.seed" in found["settings"]


def test_seeds_can_be_named(tmp_path: Path) -> None:
    run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", objective="ppo")
    found = head(RunIndex([f"mine={tmp_path}/a/run,{tmp_path}/b/run"]))
    assert found["methods"] == ["mine"]
    assert [one["name"] for one in found["runs"]] == ["a/run", "b/run"]


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    run(tmp_path / "spo")
    with pytest.raises(UserError, match=r"nowhere holds no run"):
        RunIndex([str(tmp_path / "spo"), str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"spo is named twice"):
        RunIndex([str(tmp_path / "spo"), f"x={tmp_path / 'spo'}"])


def test_every_rollout_is_in_some_chunk(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    texts = [f"{row} " + "x" * (CHUNK // 3) for row in range(8)]
    report.samples(0, "train", [trajectory(row, text) for row, text in enumerate(texts)])
    book = RunIndex([str(tmp_path / "run")])
    starts, chunks = head(book)["texts"], dict(book.chunks())
    found = [item["texts"][1] for n in range(len(starts)) for item in unpacked(chunks[f"text-{n}"])]
    assert found == texts
    assert starts == [0, 3, 6]
    assert book.chunk("text-1") == chunks["text-1"]
    assert book.chunk("text-2") == chunks["text-2"]
    assert [book.chunk(name) for name in ("text-3", "text--1", "text-x", "../head", "text-²")] == [None] * 5


def test_parts_of_a_reward_are_beside_the_texts(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    shown = trajectory(0, "a")
    shown.parts, shown.metrics = {"correct": 1.0, "format": 0.5}, {"calls": 3.0}
    report.samples(0, "test", [shown], "aime")
    report.samples(0, "train", [trajectory(0, "b")])
    book = RunIndex([str(tmp_path / "run")])
    parts, plain = unpacked(dict(book.chunks())["text-0"])
    assert (parts["parts"], parts["metrics"], parts["set"]) == (shown.parts, shown.metrics, "aime")
    assert (plain["set"], "parts" in plain) == ("", False)


def test_the_rows_that_a_run_begins_with_are_in_the_head(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    pieces = [["q" * 2 * LONGEST, False], ["a", True]]
    report.first_rows([{"name": "row 1", "pieces": pieces}])
    [row] = head(RunIndex([str(tmp_path / "run")]))["runs"][0]["rows"]
    assert row["name"] == "row 1" and row["pieces"][1] == ["a", True]
    assert LONGEST < len(row["pieces"][0][0]) < LONGEST + 50 and f"[{LONGEST} characters]" in row["pieces"][0][0]
    (tmp_path / "run" / "first_rows.json").write_text('[{"name": 1}]')
    with pytest.raises(UserError, match=r"first_rows.json was not written by a run"):
        RunIndex([str(tmp_path / "run")])


def test_it_follows_a_run_and_its_resumption(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    book = RunIndex([str(tmp_path / "run")])
    assert not book.refresh()
    for step in (1, 2):
        report.samples(step, "train", [trajectory(0, f"step {step}")])
        report.step(step, {"train/score": step / 4})
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')  # still being written
    assert book.refresh()
    assert head(book)["columns"]["step"] == [1, 2]
    assert head(book)["runs"][0]["curves"] == {"train/score": [[0, 1, 2], [0.5, 0.25, 0.5]]}
    report.keep_before(2)
    report.samples(2, "train", [trajectory(0, "step 2 again")])
    version = book.version
    assert book.refresh()
    assert book.version > version
    assert head(book)["columns"]["step"] == [1, 2]
    chunks = dict(book.chunks())
    assert [item["texts"][1] for item in unpacked(chunks["text-0"])] == ["step 1", "step 2 again"]


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    report.step(1, {"train/score": float("nan"), "actor/loss": float("inf")})
    report.samples(1, "train", [trajectory(1, "whole"), trajectory(2, "no number", reward=0.25)])
    lists = ("logp", "max_logp", "entropy", "engine_logp", "loss_T", "pull_T")
    row = {"row": 1, "group": 1, "sample": 0, "length": 2, "tokens": ["Q", "a", "b"], "sampled": [False, True, True]}
    broken = {key: [float("nan"), -1.0] for key in lists} | {"rank": [0, 1], "top": [[], []], "top_logp": [[], []]}
    report.tokens(1, "train", [row | broken | {"loss": float("nan")}])
    samples = tmp_path / "run" / "samples.jsonl"  # as older runs wrote it
    samples.write_text(samples.read_text().replace('"reward": 0.25', '"reward": NaN'))
    book = RunIndex([str(tmp_path / "run")])
    [item] = unpacked(dict(book.chunks())["token-0"])
    assert item["logp"] == item["pull"] == [None, -1.0]
    assert head(book)["runs"][0]["curves"] == {"train/score": [[0], [0.5]]}
    assert head(book)["columns"]["reward"] == [1.0, None]
    assert head(book)["columns"]["loss"] == [None, None]


def test_samples_of_older_runs_have_no_length(tmp_path: Path) -> None:
    run(tmp_path / "run")
    old = {"step": 0, "split": "train", "row": 3, "texts": ["Q", "A"], "reward": 1.0, "score": 1.0, "truncated": True}
    (tmp_path / "run" / "samples.jsonl").write_text(json.dumps(old) + "\n")
    columns = head(RunIndex([str(tmp_path / "run")]))["columns"]
    assert {name: column[0] for name, column in columns.items() if column[0] is None} == dict.fromkeys(
        ("group", "sample", "role", "length", "loss", "token")
    )
    assert columns["mark"] == [1]


def test_roles_of_an_episode_are_rollouts_with_their_names(tmp_path: Path) -> None:
    report, whole = run(tmp_path / "run"), trajectory(3, "bet")
    frozen = Trajectory(3, group=3, sample=0, texts=["Q", "pass"], role="second")
    report.samples(0, "train", [replace(whole, role="first"), frozen, whole])
    book = RunIndex([str(tmp_path / "run")])
    columns, texts = head(book)["columns"], unpacked(book.chunk("text-0") or "")
    assert head(book)["roles"] == ["first", "second"]
    assert columns["role"] == [0, 1, None]
    assert columns["reward"] == [1, None, 1], "nobody knows what an opponent earned"
    assert [(item["role"], item["texts"][1]) for item in texts] == [("first", "bet"), ("second", "pass"), ("", "bet")]
    assert len(book.runs[0].rollouts) == 3


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").write_text("{}\n"[:1] + "oops\n")
    with pytest.raises(UserError, match=r"samples\.jsonl: the line that ends at byte 6 is not JSON"):
        RunIndex([str(tmp_path / "run")])


def test_the_server_gives_out_the_page_and_its_chunks_only(tmp_path: Path) -> None:
    run(tmp_path / "run")
    book = RunIndex([str(tmp_path / "run")])
    server = Server(book, port=0)
    try:
        assert server.server_address[0] == "127.0.0.1"
        assert server.answer("/") == ("text/html; charset=utf-8", render(book, live=True))
        assert server.answer("/version") == ("text/plain", str(book.version))
        assert server.answer("/chunk/head") == ("text/plain", book.head())
        assert server.answer("/chunk/../../etc/passwd") is None
        assert server.answer("/etc/passwd") is None
    finally:
        server.server_close()


def test_data_cannot_end_the_element_that_it_is_in(tmp_path: Path) -> None:
    report = run(tmp_path / "run")
    report.samples(0, "train", [trajectory(0, "</script><script>alert(2)")])
    html = render(RunIndex([f"</script><script>alert(1)={tmp_path}/run"]))
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html
    assert "<script>alert" not in html


def test_a_browser_that_goes_away_leaves_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "run")
    server = Server(RunIndex([str(tmp_path / "run")]), port=0)
    try:
        for error in (BrokenPipeError(), ValueError("a fault of the server")):
            try:
                raise error
            except type(error):
                server.handle_error(None, ("127.0.0.1", 1))
    finally:
        server.server_close()
    assert "a fault of the server" in (said := capsys.readouterr().err)
    assert "BrokenPipe" not in said
