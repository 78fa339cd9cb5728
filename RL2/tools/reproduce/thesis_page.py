"""Page of `rl2 reproduce thesis`: claims first, then the figures in the order of the thesis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import plotly.graph_objects as go

from RL2.tools.eval.compare import Comparison
from RL2.tools.eval.intervals import accuracy
from RL2.tools.reproduce.claims import Claim, Verdict
from RL2.tools.reproduce.demo_page import Chart, colour, series, smooth, write_page
from RL2.tools.view.style import DASHES, PLOT_CONFIG, PLOT_LAYOUT


@dataclass(frozen=True)
class Curve:
    """Curve of a method: the rows of metrics.jsonl of each of its runs."""

    name: str
    title: str
    runs: Sequence[Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Row:
    """Row of a method in the table, with one figure per seed."""

    section: str
    title: str
    greedy: list[float]
    mean: list[float]
    """Mean accuracy of the samples, per seed."""
    pass_at: list[float]
    length: float
    """Mean length of greedy responses in tokens."""
    against: Comparison | None
    """Comparison with the baseline; None for the baseline itself."""


@dataclass(frozen=True)
class Part:
    """A section of the thesis; the first curve is the baseline."""

    number: str
    title: str
    lead: str
    curves: list[Curve]


@dataclass(frozen=True)
class ThesisPage:
    """Content of the page."""

    claims: list[Claim]
    questions: list[Claim]
    """Questions about later sections, about which the thesis makes no such simple claims."""
    rows: list[Row]
    baseline: str
    parts: list[Part]
    pilots: list[Curve]
    pilot_rows: list[Row]
    published: list[tuple[str, float, float]]
    """Title, greedy accuracy and pass@k as published."""
    published_problems: int
    samples: int
    settings: dict[str, str]
    reproduce: str
    commands: list[str]


def write_thesis(out_html: Path, page: ThesisPage) -> None:
    """Write the page to `out_html`."""
    n = page.published_problems
    write_page(
        out_html,
        "thesis.html",
        page=page,
        counts={word: sum(claim.verdict == word for claim in page.claims) for word in get_args(Verdict)},
        section_charts=[charts(part) for part in page.parts],
        pilot_charts=pilot_charts(page.pilots),
        colour=colour,
        published=[(title, _of(greedy, n), _of(passed, n)) for title, greedy, passed in page.published],
        fmean=fmean,
    )


def _of(share: float, number: int) -> Any:
    right = round(share * number)
    return accuracy([1.0] * right + [0.0] * (number - right))


def charts(part: Part) -> list[Chart]:
    """Return the five charts of a section in the order of the thesis; colours follow the order of methods."""
    everything = list(enumerate(part.curves))
    wanted = (
        ("test", "Test accuracy", "held-out problems, greedy", "test/score", ".0%", everything),
        ("train", "Training accuracy", "rollouts of each step", "train/score", ".0%", everything),
        ("entropy", "Entropy", "nats per sampled token", "train/entropy", ".3~f", everything),
        ("length", "Response length", "tokens", "train/length", ".3~f", everything),
        ("loss", "Loss", "of the section's own methods", "actor/loss", ".3~g", everything[1:]),
    )
    return [
        _chart(f"{part.number.replace('.', '-')}-{name}", title, note, key, tick, curves)
        for name, title, note, key, tick, curves in wanted
    ]


def pilot_charts(pilots: Sequence[Curve]) -> list[Chart]:
    """Return the charts of the pilots of section 4.4."""
    nll = "negative log-likelihood of held-out tokens, in nats"
    return [_chart("pilot-nll", "Held-out loss", nll, "test/nll", ".3~f", list(enumerate(pilots)))]


def _chart(id: str, title: str, note: str, key: str, tick: str, curves: Sequence[tuple[int, Curve]]) -> Chart:
    figure = go.Figure()
    for number, curve in curves:
        figure.add_traces(_traces(curve, key, number, tick.replace(".0%", ".1%")))
    figure.update_layout(**PLOT_LAYOUT, height=260)
    share = key.endswith("/score")
    figure.update_yaxes(tickformat=tick, rangemode="tozero" if share else "normal")
    div = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"chart-{id}", config=PLOT_CONFIG)
    return Chart(id, title, note, div)


def _traces(curve: Curve, key: str, number: int, tick: str) -> list[go.Scatter]:
    """Return the mean over seeds, and a band from the lowest to the highest; noisy series are smoothed."""
    found = [series(run, key) for run in curve.runs]
    is_noisy = not key.startswith("test/")
    by_step: dict[int, list[float]] = {}
    for steps, values in found:
        for step, value in zip(steps, smooth(values) if is_noisy else values, strict=True):
            by_step.setdefault(step, []).append(value)
    # only steps that all runs have: a mean over fewer would jump
    whole = {step: values for step, values in sorted(by_step.items()) if len(values) == len(curve.runs)}
    steps, line = list(whole), [fmean(values) for values in whole.values()]
    band = [min(values) for values in whole.values()], [max(values) for values in whole.values()]
    shared = {"x": steps, "name": curve.title, "meta": curve.name, "showlegend": False, "cliponaxis": False}
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    look = colour(number)
    return [
        go.Scatter(**shared, y=band[0], **edge),
        go.Scatter(**shared, y=band[1], **edge, fill="tonexty", fillcolor=_pale(look)),
        go.Scatter(
            **shared,
            y=line,
            mode="lines",
            line={"color": look, "width": 2.5, "dash": DASHES[number % len(DASHES)]},
            hovertemplate=f"%{{y:{tick}}}",
        ),
    ]


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},.18)"
