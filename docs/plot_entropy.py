"""The picture of docs/spo.md, from whole demos, each with a seed of its own:

    rl2 demo --seed 0 --out runs/demo-0
    rl2 demo --seed 1 --out runs/demo-1
    python docs/plot_entropy.py runs/demo-0 runs/demo-1

Entropy of the rollouts and greedy test accuracy over the steps of training: means over the demos, with bands from the
lowest to the highest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

from RL2.io.report import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

IMAGES = Path(__file__).parent / "images"
METHODS = {
    "dr_grpo": ("Dr. GRPO, token mean", "#0072B2", "-"),
    "spo_3_1": ("SPO 3.1", "#009E73", "--"),
    "spo_3_2": ("SPO 3.2", "#D55E00", "-."),
    "spo_3_3": ("SPO 3.3", "#CC79A7", ":"),
}
"""Folder of a method in a demo -> its label, colour and line, told apart by colour-blind eyes."""
INKS = {"light": "#1d2733", "dark": "#e6e9ee"}
SMOOTHED = 5
"""Number of steps over which an entropy is averaged."""
SIZE = 5.6, 3.5

Curve = dict[int, float]
"""Step -> value."""


def curve(run: Path, metric: str) -> Curve:
    """Return the values of a metric in metrics.jsonl of a run."""
    return {int(row["step"]): row[metric] for row in read_metrics(run) if metric in row}


def smoothed(values: Curve) -> Curve:
    """Return the mean of each value and those before it, of `SMOOTHED` steps."""
    return {step: fmean(values[s] for s in range(max(0, step - SMOOTHED + 1), step + 1)) for step in values}


def draw(ax: Axes, curves: Sequence[Curve], label: str, colour: str, style: str) -> None:
    """Draw the mean of some curves over the steps that all have, and their range."""
    steps = sorted(set.intersection(*(set(each) for each in curves)))
    means = [fmean(each[step] for each in curves) for step in steps]
    ax.plot(steps, means, color=colour, linestyle=style, label=label, linewidth=2)
    low, high = ([edge(each[step] for each in curves) for step in steps] for edge in (min, max))
    ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def figure(file: Path, demos: Sequence[Path], ink: str) -> None:
    """Write the picture with text and axes in the colour `ink`, on a transparent ground."""
    fig, (left, right) = plt.subplots(1, 2, figsize=SIZE)
    for name, (label, colour, style) in METHODS.items():
        draw(left, [smoothed(curve(demo / name, "train/entropy")) for demo in demos], label, colour, style)
        draw(right, [curve(demo / name, "test/score") for demo in demos], label, colour, style)
    left.set_title("Entropy, nats per token")
    left.set_yscale("log")
    left.yaxis.set_major_locator(FixedLocator([0.02, 0.05, 0.1, 0.2, 0.4]))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter("{x:g}")
    right.set_title("Test accuracy")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[:].set_color(ink)
        ax.tick_params(colors=ink)
        for text in (ax.title, ax.xaxis.label):
            text.set_color(ink)
    fig.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, labelcolor=ink)
    fig.tight_layout(rect=(0, 0.14, 1, 1))
    fig.savefig(file, transparent=True, metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    demos = [Path(name) for name in sys.argv[1:]]
    if not demos:
        sys.exit("give the folders of one or more whole demos: python docs/plot_entropy.py runs/demo-0 runs/demo-1")
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "svg.hashsalt": "entropy"})
    for name, ink in INKS.items():
        figure(IMAGES / f"entropy-{name}.svg", demos, ink)


if __name__ == "__main__":
    main()
