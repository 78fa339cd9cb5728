"""The pictures of docs/objectives.md: python docs/plot_objectives.py

Loss, gradient and effect on the entropy of every objective over the probability p_a of the sampled token, through the
library's own functions in float64. Its rivals share the rest: the strongest takes a part s of it, the next one the same
part of what is left, and so on. T points of a curve are T tokens of one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from RL2.objectives.registry import bind
from RL2.ops.token_stats import reference_stats
from RL2.types import TokenBatch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parent / "images"
P_OLD = 0.4
RIVALS = 60
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, told apart by colour-blind eyes
ROWS = ("loss", "d loss /\nd logit of $a$", "change of entropy")

plt.rcParams.update({"font.size": 12, "axes.titlesize": 12, "lines.linewidth": 2.0})


@dataclass(frozen=True)
class Panel:
    """One column of a figure."""

    title: str
    name: str
    knobs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One curve of every panel."""

    label: str
    colour: str
    style: str
    share: float
    """s: the part of the rest that the strongest rival has."""
    advantage: float = 1.0


def distributions(p_T: Tensor, share: float) -> Tensor:
    """[T, V] logits; the sampled token is number 0."""
    of_rest_V = share * (1 - share) ** torch.arange(RIVALS, dtype=torch.float64)
    return torch.cat([p_T[:, None], (1 - p_T)[:, None] * of_rest_V / of_rest_V.sum()], -1).log()


def curves(panel: Panel, line: Line, p_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its derivative by the logit of a, and the change of the entropy for a small step against the gradient, as a
    multiple of the step."""
    zeros_T, ones_T = torch.zeros(len(p_T), dtype=torch.long), torch.ones_like(p_T)
    batch = TokenBatch(
        token_ids_T=zeros_T,
        labels_T=zeros_T,
        position_ids_T=zeros_T,
        action_T=ones_T.bool(),
        reward_T=ones_T,
        cu_seqlens=torch.arange(len(p_T) + 1),  # a sequence each
        trajectory_B=torch.arange(len(p_T)),
        group_B=torch.arange(len(p_T)),
        old_logp_T=ones_T.mul(P_OLD).log(),
        advantage_T=line.advantage * ones_T,
    )
    bound = bind(panel.name, panel.knobs)
    logits_TV = distributions(p_T, line.share).requires_grad_()
    stats = reference_stats(logits_TV, zeros_T, (*bound.fields, "entropy"), bound.top_k)
    loss_T, _ = bound.loss(stats, batch)
    (grad_TV,) = torch.autograd.grad(loss_T.sum(), logits_TV, retain_graph=True)
    (entropy_grad_TV,) = torch.autograd.grad(stats.entropy.sum(), logits_TV)
    return loss_T.detach(), grad_TV[:, 0], -(grad_TV * entropy_grad_TV).sum(-1)


def figure(file: str, title: str, panels: list[Panel], lines: list[Line], limits: list[tuple[float, float]]) -> None:
    p_T = torch.linspace(0.0015, 0.9985, 998, dtype=torch.float64)
    size = (2.05 * len(panels) + 1.2, 7.0)
    fig, axes = plt.subplots(3, len(panels), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, panel in zip(axes.T, panels, strict=True):
        for line in lines:
            for ax, y_T in zip(column, curves(panel, line, p_T), strict=True):
                ax.plot(p_T, y_T, color=line.colour, linestyle=line.style, label=line.label)
        column[0].set_title(panel.title)
        column[-1].set_xlabel("$p_a$")
    for row, name, limit in zip(axes, ROWS, limits, strict=True):
        row[0].set_ylabel(name)
        row[0].set_ylim(*limit)
        for ax in row:
            ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            ax.set_xlim(0, 1)
            ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            ax.grid(color="0.92")
            ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title, fontsize=13, x=0.01, ha="left")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=len(lines), frameon=False)
    fig.tight_layout(rect=(0, 0.05, 1, 1))
    fig.savefig(IMAGES / file, dpi=110)
    plt.close(fig)


RIVALRY = [
    Line("strongest rival has 90% of the rest", BLUE, "-", 0.9),
    Line("50%", ORANGE, "--", 0.5),
    Line("20%", GREEN, ":", 0.2),
]
SIGNS = [
    Line("advantage +1", BLUE, "-", 0.5, 1.0),
    Line("advantage -1", ORANGE, "--", 0.5, -1.0),
]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    figure(
        "objectives_path.png",
        "SPO family, over the probability $p_a$ of the sampled token $a$",
        [
            Panel("cross-entropy\n(positive_ce, sft)", "positive_ce"),
            Panel("spo\nlive target", "spo"),
            Panel("spo\ndetach_target", "spo", {"detach_target": True}),
            Panel("binary_jsd\nlive target", "binary_jsd"),
            Panel("binary_jsd\ndetach_target", "binary_jsd", {"detach_target": True}),
            Panel("spo_0p5\nabove_half", "spo_0p5"),
            Panel("spo_0p5\nall", "spo_0p5", {"region": "all"}),
        ],
        RIVALRY,
        [(-0.1, 3.2), (-1.05, 0.6), (-0.45, 0.7)],
    )
    figure(
        "objectives_rank.png",
        "Rank family, over the probability $p_a$ of the sampled token $a$",
        [
            Panel("rank_kl", "rank_kl"),
            Panel("rank_kl\nrank_cap=2", "rank_kl", {"rank_cap": 2}),
            Panel("rank_jsd", "rank_jsd"),
            Panel("rank_jsd\nrank_cap=2", "rank_jsd", {"rank_cap": 2}),
        ],
        RIVALRY,
        [(-0.1, 3.2), (-1.05, 0.2), (-0.08, 0.45)],
    )
    figure(
        "objectives_policy.png",
        f"Policy-gradient family: $p_a$ was {P_OLD} when the rollout arrived; the strongest rival has 50% of the rest",
        [
            Panel("reinforce", "reinforce"),
            Panel("ppo", "ppo"),
            Panel("ppo clip_high=0.5\ndual_clip=1.8", "ppo", {"clip_high": 0.5, "dual_clip": 1.8}),
            Panel("gspo\none token long", "gspo"),
            Panel("cispo\nratio_max=1.5", "cispo", {"ratio_max": 1.5}),
            Panel("sapo", "sapo"),
        ],
        SIGNS,
        [(-3.3, 3.3), (-1.3, 1.3), (-0.4, 0.4)],
    )


if __name__ == "__main__":
    main()
