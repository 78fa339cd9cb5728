"""Self-contained HTML page that compares runs, made from their folders.

A run folder has metrics.jsonl (a row per step) and samples.jsonl (some trajectories). This module does not import the
training code, and neither it nor the page uses the network, so that the page can be mailed or opened years later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from RL2.io.jsonl import read_records
from RL2.tools.eval.intervals import Estimate, accuracy, first_to_last, paired_difference
from RL2.tools.view.style import COLOURS, DASHES, PLOT_CONFIG, PLOT_LAYOUT

Row = dict[str, Any]

MARKERS = ("circle", "square", "diamond", "x", "triangle-up", "cross")


def colour(number: int) -> str:
    """Return the colour of the `number`-th method of a page."""
    return COLOURS[number % len(COLOURS)]


EDGE_STEPS = 10
"""Number of steps over which `first` and `last` values of noisy series are averaged."""


@dataclass(frozen=True)
class Scores:
    """Scores of one model, one per problem: the greedy answer, and one sampled at temperature 1."""

    greedy: list[float]
    sampled: list[float]


@dataclass(frozen=True)
class RunView:
    """Data of one run for the page."""

    name: str
    title: str
    metrics: list[Row]
    samples: list[Row]
    before: Scores | None = None
    """Scores of the model from which the run started."""
    after: Scores | None = None
    seconds: float | None = None
    """Wall-clock seconds of the run."""

    @classmethod
    def read(cls, folder: Path, title: str, **more: Any) -> RunView:
        metrics, samples = (list(read_records(folder / name)) for name in ("metrics.jsonl", "samples.jsonl"))
        return cls(name=folder.name, title=title, metrics=metrics, samples=samples, **more)


def series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of `key` where it is present and finite."""
    points = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
    points = [(step, float(value)) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


@dataclass(frozen=True)
class Summary:
    """Figures of one run for the table; None where the run lacks the data."""

    title: str
    problems: int | None = None
    greedy_before: float | None = None
    greedy_before_interval: tuple[float, float] | None = None
    greedy_after: float | None = None
    greedy_after_interval: tuple[float, float] | None = None
    greedy_difference: float | None = None
    greedy_difference_interval: tuple[float, float] | None = None
    sampled_before: float | None = None
    sampled_before_interval: tuple[float, float] | None = None
    sampled_after: float | None = None
    sampled_after_interval: tuple[float, float] | None = None
    sampled_difference: float | None = None
    sampled_difference_interval: tuple[float, float] | None = None
    entropy_first: float | None = None
    entropy_last: float | None = None
    entropy_difference: float | None = None
    entropy_difference_interval: tuple[float, float] | None = None
    length_first: float | None = None
    length_last: float | None = None
    length_difference: float | None = None
    length_difference_interval: tuple[float, float] | None = None
    test_best: float | None = None
    test_last: float | None = None
    collapsed: bool | None = None
    """True if the last test score is below half of the best one of the run."""
    seconds: float | None = None


def summarise(run: RunView) -> Summary:
    """Return the figures of one run."""
    figures: dict[str, Any] = {}

    def put(name: str, estimate: Estimate) -> None:
        figures[name] = estimate.value
        figures[f"{name}_interval"] = (estimate.low, estimate.high)

    if run.before and run.after:
        figures["problems"] = len(run.after.greedy)
        for mode in ("greedy", "sampled"):
            before, after = getattr(run.before, mode), getattr(run.after, mode)
            put(f"{mode}_before", accuracy(before))
            put(f"{mode}_after", accuracy(after))
            put(f"{mode}_difference", paired_difference(before, after))
    for name in ("entropy", "length"):
        _, values = series(run.metrics, f"train/{name}")
        edge = min(EDGE_STEPS, len(values) // 2)
        if edge >= 2:
            figures |= {f"{name}_first": fmean(values[:edge]), f"{name}_last": fmean(values[-edge:])}
            put(f"{name}_difference", first_to_last(values, edge))
    _, tests = series(run.metrics, "test/score")
    if tests:
        best, last = max(tests), tests[-1]
        figures |= {"test_best": best, "test_last": last, "collapsed": last < best / 2}
    return Summary(title=run.title, seconds=run.seconds, **figures)


def summary_json(runs: Sequence[RunView]) -> dict[str, dict[str, Any]]:
    """Return the figures of the page by run name."""
    return {run.name: asdict(summarise(run)) for run in runs}


def headline(runs: Sequence[RunView]) -> str:
    """Return a one-paragraph summary."""
    found = [summarise(run) for run in runs]
    sentences = []
    scored = [s for s in found if s.greedy_after is not None]
    if len(scored) > 1:
        best = max(scored, key=lambda s: s.greedy_after or 0.0)
        sentences.append(f"{best.title} ended with the highest greedy accuracy, {best.greedy_after:.1%}.")
    moves: dict[str, list[str]] = {}
    for s in found:
        if s.entropy_difference is not None:
            moves.setdefault(_move(s, "entropy"), []).append(s.title)
    if moves:
        sentences.append("Entropy " + "; it ".join(f"{move} under {_list(who)}" for move, who in moves.items()) + ".")
    judged = [s for s in found if s.collapsed is not None]
    if judged:
        fallen = [s.title for s in judged if s.collapsed]
        sentences.append(f"{_list(fallen)} collapsed." if fallen else "No run collapsed.")
    return " ".join(sentences)


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


class Finding(NamedTuple):
    """A run's title and a sentence on its results."""

    title: str
    text: str


def findings(runs: Sequence[RunView]) -> list[Finding]:
    """Return one sentence per run on its results."""
    return [Finding(s.title, _finding(s)) for s in map(summarise, runs)]


def _finding(s: Summary) -> str:
    parts = []
    if s.greedy_after is not None:
        parts.append(f"greedy accuracy {_move(s, 'greedy')} from {s.greedy_before:.1%} to {s.greedy_after:.1%}")
        parts.append(f"sampled accuracy {_move(s, 'sampled')} from {s.sampled_before:.1%} to {s.sampled_after:.1%}")
    if s.entropy_difference is not None:
        parts.append(f"entropy {_move(s, 'entropy')} from {s.entropy_first:.3f} to {s.entropy_last:.3f}")
    if s.collapsed is not None:
        parts.append("the run collapsed" if s.collapsed else "the run did not collapse")
    return "; ".join(parts) + "." if parts else "wrote no figures to judge by."


def _move(s: Summary, name: str) -> str:
    """Return the direction of a change, if its interval excludes no change."""
    low, high = getattr(s, f"{name}_difference_interval")
    if low <= 0 <= high:
        return "did not clearly move"
    return "rose" if low > 0 else "fell"


_FROM_ZERO = ("test/score", "train/score", "train/entropy")


class Chart(NamedTuple):
    """A chart as HTML, with its title and a note."""

    id: str
    title: str
    note: str
    div: str


def charts(runs: Sequence[RunView]) -> list[Chart]:
    """Return the five charts; a method has the same colour in all of them."""

    def draw(id: str, title: str, note: str, key: str, tick: str, **look: bool) -> Chart:
        figure = go.Figure()
        for number, run in enumerate(runs):
            figure.add_traces(_traces(run, key, number, tick.replace(".0%", ".1%"), **look))
        figure.update_layout(**PLOT_LAYOUT, height=360 if id == "test" else 280)
        figure.update_yaxes(tickformat=tick, rangemode="tozero" if key in _FROM_ZERO else "normal")
        div = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart-{id}", config=PLOT_CONFIG)
        return Chart(id, title, note, div)

    return [
        draw("test", "Test accuracy", "held-out problems, greedy", "test/score", ".0%", noisy=False),
        draw("train", "Training accuracy", "rollouts of each step", "train/score", ".0%"),
        draw("entropy", "Entropy", "nats per sampled token, estimated from the rollouts", "train/entropy", ".3~f"),
        draw("length", "Response length", "tokens", "train/length", ".3~f"),
        # methods minimise different losses: on one scale the largest would flatten the others
        draw("loss", "Loss", "each as a share of its own largest value", "actor/loss", ".3~g", scaled=True),
    ]


def _traces(
    run: RunView, key: str, number: int, tick: str, *, noisy: bool = True, scaled: bool = False
) -> list[go.Scatter]:
    """Return one line, or for a noisy series two: the values, faint, and their running mean."""
    steps, values = series(run.metrics, key)
    largest = max(map(abs, values), default=1.0) or 1.0
    heights = [value / largest for value in values] if scaled else values
    look = colour(number)
    shared = {"x": steps, "name": run.title, "meta": run.name, "showlegend": False, "cliponaxis": False}
    faint = go.Scatter(
        **shared, y=heights, mode="lines", line={"color": look, "width": 1}, opacity=0.3, hoverinfo="skip"
    )
    strong = go.Scatter(
        **shared,
        y=smooth(heights) if noisy else heights,
        mode="lines" if noisy else "lines+markers",
        line={"color": look, "width": 2.5, "dash": DASHES[number % len(DASHES)]},
        marker={"symbol": MARKERS[number % len(MARKERS)], "size": 8},
        customdata=values,  # the hover text shows the value itself, neither smoothed nor scaled
        hovertemplate=f"%{{customdata:{tick}}}",
    )
    return [faint, strong] if noisy else [strong]


def smooth(values: Sequence[float], reach: int = 3) -> list[float]:
    """Return the mean over neighbours up to `reach` steps away; near the ends fewer, but symmetric."""
    n = len(values)
    reaches = [min(reach, i, n - 1 - i) for i in range(n)]
    return [fmean(values[i - r : i + r + 1]) for i, r in enumerate(reaches)]


class Piece(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    special: bool
    """True if this is a token of the chat template."""


class Rollout(NamedTuple):
    """A rollout to read: the question, the turns after it, and the reward."""

    question: list[Piece]
    turns: list[tuple[str, list[Piece]]]
    """Pairs of speaker (`response` or `environment`) and text after the question."""
    reward: float
    correct: bool
    note: str


class Reading(NamedTuple):
    """Rollouts of one step to read."""

    step: int
    rollouts: list[Rollout]


_SPECIAL = re.compile(r"(<\|[^<|>]*\|>)")


def pieces(text: str) -> list[Piece]:
    """Split a text at the tokens of the chat template."""
    parts = _SPECIAL.split(text)
    return [Piece(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def readings(run: RunView, *, each: int = 2) -> list[Reading]:
    """Return some correct and some wrong training rollouts of the first and the last step."""
    rows = [row for row in run.samples if row.get("split") == "train" and row.get("texts")]
    steps = sorted({row["step"] for row in rows})
    found = []
    for step in steps[:1] + steps[1:][-1:]:
        here = [row for row in rows if row["step"] == step]
        # one per problem, since samples of a group are similar
        right = list({row.get("row"): row for row in here if row.get("reward", 0) > 0}.values())
        wrong = list({row.get("row"): row for row in here if not row.get("reward", 0) > 0}.values())
        found.append(Reading(step, [_rollout(row) for row in right[:each] + wrong[:each]]))
    return found


def _rollout(row: Row) -> Rollout:
    question, *rest = row["texts"]
    turns = [("environment" if i % 2 else "response", pieces(text)) for i, text in enumerate(rest)]
    cut = "cut off at the length limit" if row.get("truncated") else ""
    unscored = f"no reward: {row['unscored']}" if row.get("unscored") else ""
    note = ", ".join(filter(None, [cut, unscored]))
    return Rollout(pieces(question), turns, row.get("reward", 0.0), row.get("reward", 0) > 0, note)


class Key(NamedTuple):
    """An entry of the legend."""

    name: str
    title: str
    colour: str


@dataclass(frozen=True)
class Page:
    """Text around the figures."""

    title: str
    lead: str = ""
    """Description of what was run, in a sentence or two."""
    settings: dict[str, str] = field(default_factory=dict)
    reproduce: str = ""
    """Command line that creates this page."""
    commands: list[str] = field(default_factory=list)
    """Command lines that the reproduction runs."""


def write_report(out_html: Path, runs: Sequence[RunView], page: Page) -> None:
    """Write the page that compares `runs`."""
    write_page(
        out_html,
        "report.html",
        page=page,
        runs=runs,
        keys=[Key(run.name, run.title, colour(i)) for i, run in enumerate(runs)],
        summaries=[summarise(run) for run in runs],
        headline=headline(runs),
        findings=findings(runs),
        charts=charts(runs),
        readings=[readings(run) for run in runs],
        edge_steps=EDGE_STEPS,
    )


def write_page(out_html: Path, template: str, **values: Any) -> None:
    """Render a template of this folder, including plotly's code."""
    # model output is untrusted: everything is escaped except the strings from plotly
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("RL2.tools.reproduce", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.globals |= {"percent": _percent, "points": _points, "number": _number}
    html = environment.get_template(template).render(**values, plotly=get_plotlyjs())
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(html, encoding="utf-8")


_NONE = "\N{EN DASH}"


def _percent(x: float | None, digits: int = 1) -> str:
    return _NONE if x is None else f"{100 * x:.{digits}f}"


def _points(x: float | None) -> str:
    """Format a difference of two accuracies in percentage points, with a sign."""
    return _NONE if x is None else f"{100 * x:+.1f}".replace("-", "\N{MINUS SIGN}")


def _number(x: float | None, digits: int = 2) -> str:
    return _NONE if x is None else f"{x:.{digits}f}"
