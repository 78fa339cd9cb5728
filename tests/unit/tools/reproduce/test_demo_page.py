"""The page that compares runs: from made-up run folders."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from RL2.tools.reproduce.demo_page import (
    Page,
    RunView,
    Scores,
    findings,
    headline,
    readings,
    summarise,
    summary_json,
    write_report,
)

pytest.importorskip("plotly")

HOSTILE = "<script>alert(1)</script>"


class Tags(HTMLParser):
    """The elements of a page, and what it says outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


def write_run(folder: Path, entropy: list[float], tests: list[float]) -> None:
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"step": i + 1, "train/score": 0.5, "train/entropy": e, "train/length": 21.0, "actor/loss": 0.1}
        for i, e in enumerate(entropy)
    ]
    del rows[1]["actor/loss"]  # a row need not have everything
    rows[2]["train/score"] = None
    rows += [{"step": i * 10, "test/score": score} for i, score in enumerate(tests)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "tor')
    samples = [
        {
            "step": step,
            "row": 0,
            "group": 0,
            "sample": 0,
            "split": "train",
            "texts": ["<|im_start|>user\nHow many?", f"#### 3 {HOSTILE}"],
            "reward": reward,
            "score": max(reward, 0.1),  # partial credit, which is not right
            "truncated": not reward,
            "unscored": None,
        }
        for step in (1, 5, 10)
        for reward in (0.0, 1.0)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))


@pytest.fixture
def runs(tmp_path: Path) -> list[RunView]:
    noise = [0.0005, -0.0005, 0.0, -0.0008, 0.0008]
    write_run(tmp_path / "one", [level + x for level in (0.09, 0.12) for x in noise], [0.5, 0.8])
    write_run(tmp_path / "two", [level + x for level in (0.09, 0.03) for x in noise], [0.5, 0.9, 0.1])
    before = Scores([0.0, 1.0] * 50, [0.0] * 60 + [1.0] * 40)
    better, worse = Scores([1.0] * 90 + [0.0] * 10, [1.0] * 100), Scores([0.0] * 100, before.sampled)
    return [
        RunView.read(tmp_path / "one", "Method <One>", before=before, after=better, seconds=12.0),
        RunView.read(tmp_path / "two", "Method Two", before=before, after=worse, seconds=13.0),
    ]


def parse(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    return tags


def test_the_page_is_self_contained_and_shows_every_run(runs: list[RunView], tmp_path: Path) -> None:
    out = tmp_path / "page" / "report.html"
    write_report(out, runs, Page(title="A comparison", settings={"seed": "0"}, reproduce="make it", commands=["run x"]))
    tags = parse(out)
    assert [(tag, name) for tag, name, _ in tags.attributes if name in ("src", "href", "action")] == []
    assert ("meta", "http-equiv", "Content-Security-Policy") in tags.attributes
    assert "default-src 'none'" in next(v for tag, name, v in tags.attributes if name == "content" and "src" in v)
    for run in runs:
        assert tags.text.count(run.title) >= 3  # findings, table, legend and rollouts
    for chart in ("test", "train", "entropy", "length", "loss"):
        assert ("div", "id", f"chart-{chart}") in tags.attributes
    for words in ("A comparison", "make it", "run x", "First step of training (step 1)", "cut off at the length limit"):
        assert words in tags.text


def test_what_a_model_writes_is_only_shown(runs: list[RunView], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", runs, Page(title=f"Title {HOSTILE}", commands=[HOSTILE]))
    tags = parse(tmp_path / "report.html")
    assert tags.text.count(HOSTILE) >= 2
    assert not any(script.strip().startswith("alert") for script in tags.scripts)
    assert HOSTILE not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_findings_say_what_came_out(runs: list[RunView]) -> None:
    one, two = (finding.text for finding in findings(runs))
    assert "greedy accuracy rose from 50.0% to 90.0%" in one
    assert "entropy rose from 0.090 to 0.120" in one
    assert "did not collapse" in one
    assert "greedy accuracy fell from 50.0% to 0.0%" in two
    assert "sampled accuracy did not clearly move from 40.0% to 40.0%" in two
    assert "entropy fell from 0.090 to 0.030" in two
    assert "the run collapsed" in two
    assert headline(runs) == (
        "Method <One> ended with the highest greedy accuracy, 90.0%. Entropy rose under Method <One>; "
        "it fell under Method Two. Method Two collapsed."
    )


def test_rollouts_are_correct_by_their_reward(runs: list[RunView]) -> None:
    shown = [rollout for reading in readings(runs[0]) for rollout in reading.rollouts]
    assert [(rollout.reward, rollout.correct) for rollout in shown] == [(1.0, True), (0.0, False)] * 2


def test_the_summary_holds_the_same_figures(runs: list[RunView]) -> None:
    summary = json.loads(json.dumps(summary_json(runs)))
    assert set(summary) == {"one", "two"}
    assert summary["one"]["greedy_before"] == 0.5
    assert summary["one"]["greedy_after"] == 0.9
    assert summary["one"]["sampled_after_interval"][1] == 1.0
    assert summary["two"]["collapsed"] is True
    assert summary["two"]["greedy_difference"] == -0.5


def test_a_run_without_figures_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = RunView.read(tmp_path / "empty", "Nothing yet")
    assert summarise(run).greedy_after is None
    assert findings([run])[0].text == "wrote no figures to judge by."
    write_report(tmp_path / "report.html", [run], Page(title="Empty"))
    assert "This run kept no samples." in parse(tmp_path / "report.html").text
