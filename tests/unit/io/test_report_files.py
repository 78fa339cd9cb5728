"""What a run writes: lines that can be read again, and dashboards with the same names."""

import io
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import RL2
from RL2.io.jsonl import lines_backwards
from RL2.io.report import SAMPLES_BEFORE, RecordsFailed, Report, TensorBoard
from RL2.tools.view.run_index import RunIndex
from RL2.types import Trajectory


def test_a_step_is_a_line_here_and_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, is_first=True, num_steps=9, dashboards=[TensorBoard(tmp_path)])
    report.step(3, {"train/score": 0.5, "actor/loss": -0.25, "train/unscored": 2.0, "other": 7.0})
    report.close()
    said = capsys.readouterr().out
    assert re.fullmatch(r"step 3/9  score 0\.500  loss -0\.2500  UNSCORED 2  at \d\d:\d\d:\d\d\n", said)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 3, "train/score": 0.5, "actor/loss": -0.25, "train/unscored": 2.0, "other": 7.0}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("actor/loss")] == [(3, -0.25)]


def test_the_console_says_whose_entropy_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report(tmp_path, is_first=True, num_steps=9).step(0, {"train/entropy": 0.08, "actor/entropy": 0.82})
    assert "  rollout entropy 0.080  trained entropy 0.820  " in capsys.readouterr().out


@pytest.mark.slow
def test_trackio_goes_on_with_the_run_of_its_folder(tmp_path: Path) -> None:
    """In a process of its own, as it reads where to write when it is imported, and starts threads."""
    script = """
import sys
from pathlib import Path
from RL2.io.report import Trackio
for folder, step in (("a", 0), ("a", 1), ("b", 0)):
    dashboard = Trackio(Path(folder), None, "same name", {"lr": 1e-3})
    dashboard.log({"actor/loss": 0.5}, step)
    dashboard.finish()
"""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "PYTHONPATH": str(Path(RL2.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=600)
    with sqlite3.connect(tmp_path / "kept" / "RL2.db") as db:
        rows = db.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert [(name, step, json.loads(metrics)) for _, name, step, metrics in rows] == [
        ("same name", step, {"actor/loss": 0.5}) for step in (0, 1, 0)
    ]
    first, resumed, other = (run_id for run_id, *_ in rows)
    assert first == resumed != other


def test_a_step_says_how_much_time_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, is_first=True, num_steps=9)
    report.begin(5)
    assert report.begun is not None
    report.begun = (5, report.begun[1] - 120)
    for step in (6, 8, 9):
        report.step(step, {"actor/loss": 0.0})
    first, last, test = capsys.readouterr().out.splitlines()
    assert first.endswith("  left 2:00"), "two steps of a minute each remain"
    assert "left" not in last + test


def test_samples_and_tokens_take_no_more_than_they_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The oldest go, what is left has no hole, and a resumed run cuts both files of samples back."""
    report = Report(tmp_path, is_first=True, num_steps=99, limit_bytes=40_000)
    samples, before = tmp_path / "samples.jsonl", tmp_path / SAMPLES_BEFORE
    for step in range(60):
        report.samples(step, "train", [Trajectory(0, 0, 0, texts=["q" * 500, "a" * 500])])
        report.tokens(step, "train", [{"row": 0, "token_ids": Random(step).choices(range(1 << 30), k=250)}])
        sizes = [file.stat().st_size for file in (samples, before) if file.exists()]
        assert sum(sizes) < 22_000
        assert sum(file.stat().st_size for file in (tmp_path / "tokens").iterdir()) <= 20_000
    steps = [row["step"] for file in (before, samples) for row in map(json.loads, file.open())]
    assert steps == list(range(steps[0], 60)) and 10 < len(steps) < 25
    kept = sorted(int(file.name[:6]) for file in (tmp_path / "tokens").iterdir())
    assert kept == list(range(kept[0], 60)) and 1 < len(kept) < 20
    said = capsys.readouterr().out
    assert said.count("are removed from now on: trainer.records_mib") == 2
    [run] = RunIndex([str(tmp_path)]).runs
    assert len(run.rollouts) == len(steps)
    report.keep_before(steps[3])
    assert [row["step"] for file in (before, samples) for row in map(json.loads, file.open())] == steps[:3]


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, is_first=False, num_steps=9)
    report.step(0, {"actor/loss": 1.0})
    report.samples(0, "train", [Trajectory(0, 0, 0)])
    report.tokens(0, "train", [{"row": 0}])
    report.say("hello")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_resuming_forgets_what_will_come_again(tmp_path: Path) -> None:
    """Model text may hold any character that some reader takes for the end of a line."""
    report = Report(tmp_path, is_first=True, num_steps=9)
    for step in range(3):
        report.step(step, {"actor/loss": float(step)})
        report.samples(step, "train", [Trajectory(0, 0, 0, texts=["a\u2028b\u0085c\nd"])])
        report.tokens(step, "train", [{"row": 0, "tokens": ["a\u2028"], "top": [["a"]]}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "actor/lo')  # killed while writing
    report.keep_before(2)
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    kept = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").strip().split("\n")]
    assert [file.name for file in sorted(tmp_path.glob("tokens/*"))] == ["000000_train.parquet", "000001_train.parquet"]
    assert [row["texts"] for row in kept] == [["a\u2028b\u0085c\nd"]] * 2


def test_numbers_that_json_has_not_are_said_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, is_first=True, num_steps=3)
    report.step(1, {"actor/loss": 0.5, "train/entropy": math.nan, "actor/kl": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "actor/loss": 0.5}
    assert "step 1: WARNING: not recorded" in (said := capsys.readouterr().out)
    assert "actor/kl=inf, train/entropy=nan" in said
    assert not any("actor/kl" in row for row in report.rows())


def test_records_are_cut_back_from_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path, is_first=True, num_steps=9)
    for step in range(6):
        report.step(step, {"actor/loss": 0.5})
        report.samples(step, "train", [Trajectory(step, 0, 0, texts=["\r\n\u2028 é" * 50_000])] * (step % 3))
    lines = (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(b"no line of a run: it is never read\n" + b"".join(lines) + lines[-1][:9])
    report.keep_before(4)
    assert [row["step"] for row in report.rows()] == [0, 1, 2, 3]
    assert (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)[1:] == lines[:3]
    assert "records of the steps 4 to 5 are cut off; these steps are run again\n" in capsys.readouterr().out
    report.keep_before(4)
    assert capsys.readouterr().out == ""
    assert len(report.rows()) == 4


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("text", [b"", b"\n", b"a\n", b"a", b"ab\ncde\n\nf", b"ab\ncde\n\nf\n"])
def test_lines_are_read_backwards(text: bytes, block: int) -> None:
    forwards = text.splitlines(keepends=True)
    starts = [sum(map(len, forwards[:n])) for n in range(len(forwards))]
    found = list(lines_backwards(io.BytesIO(text), block))
    assert found[::-1] == list(zip(starts, forwards, strict=True))


def test_a_run_that_begins_anew_sets_the_records_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for loss in (1.0, 2.0):
        report = Report(tmp_path, is_first=True, num_steps=9)
        report.keep_before(0)
        report.step(0, {"actor/loss": loss})
        report.samples(0, "train", [Trajectory(0, 0, 0)])
    assert "records of the steps 0 to 0 are set aside, in files with .superseded" in capsys.readouterr().out
    assert '"actor/loss": 1.0' in (tmp_path / "metrics.jsonl.superseded").read_text()
    assert '"actor/loss": 2.0' in (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "samples.jsonl.superseded").exists()


@pytest.mark.parametrize("what", ["metrics", "samples", "tokens", "cut"])
def test_records_that_cannot_be_written_end_in_a_line(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    report = Report(folder, is_first=True, num_steps=9)
    report.step(0, {"actor/loss": 0.5})
    if what == "cut":  # its name is taken by a folder
        (folder / "samples.jsonl").mkdir()
    else:
        shutil.rmtree(folder)  # while the run is at work
    writes = {
        "metrics": lambda: report.step(1, {"actor/loss": 0.5}),
        "samples": lambda: report.samples(1, "train", [Trajectory(0, 0, 0)]),
        "tokens": lambda: report.tokens(1, "train", [{"row": 1}]),
        "cut": lambda: report.keep_before(1),
    }
    with pytest.raises(RecordsFailed, match=r"the records in .*/run could not be written \(.*load_ckpt_from=latest$"):
        writes[what]()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RecordsFailed, match="No space left on device"):
        Report(tmp_path, is_first=True, num_steps=9).step(1, {"actor/loss": 0.5})
