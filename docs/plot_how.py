"""The picture of docs/how.md, in light and dark: python docs/plot_how.py

It is narrow, so that its text can be read on a phone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 400, 470
BOX = 172, 56
"""Width and height of a box."""
COLUMNS = 8, 212
"""Left edges of the boxes."""
ROW = 94
"""Distance of rows."""


@dataclass(frozen=True)
class Colours:
    """Colours of a variant; boxes have a fill for each kind."""

    text: str
    detail: str
    line: str
    fills: dict[str, str]


VARIANTS = {
    "light": Colours(
        "#1d2733",
        "#45505c",
        "#5b6673",
        {"data": "#eef2f7", "rollout": "#e4efe6", "loss": "#fbeedd", "update": "#e9e6f5", "aside": "none"},
    ),
    "dark": Colours(
        "#e6e9ee",
        "#b6bec9",
        "#8d97a5",
        {"data": "#2b3442", "rollout": "#26412f", "loss": "#4a3a22", "update": "#373058", "aside": "none"},
    ),
}

BOXES = [
    (0, 0, "data", "Prompts", "rows of data"),
    (0, 1, "rollout", "Rollout", "engine ⇄ environment"),
    (0, 2, "data", "Trajectories", "on every process"),
    (0, 3, "data", "One packed batch", "weight_T, advantage_T"),
    (0, 4, "aside", "", "rows of sft, rm and dpo"),
    (1, 0, "aside", "", "metrics, samples, tokens"),
    (1, 1, "update", "Weights", "version n + 1"),
    (1, 2, "update", "Σ loss_T · weight_T", "backward, optimizer step"),
    (1, 3, "loss", "Objective", "stats, batch → loss_T"),
    (1, 4, "loss", "token_stats()", "the only reader of logits"),
]
"""Column, row, kind, title and detail of each box."""

ARROWS = [
    ("M94 70V104", False),  # prompts to rollout
    ("M94 164V198", False),  # rollout to trajectories
    ("M94 258V292", False),  # trajectories to batch
    ("M94 390V356", True),  # supervised rows to batch
    ("M180 324H196V418H208", False),  # batch to statistics
    ("M298 390V356", False),  # statistics to objective
    ("M298 296V262", False),  # objective to loss
    ("M298 202V168", False),  # loss to weights
    ("M212 136H184", False),  # weights to rollout
    ("M384 230H394V42H388", True),  # loss to metrics
]
"""Path of each arrow, and whether it is dashed."""


def drawing(colours: Colours) -> str:
    """Return the picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        'aria-label="One step of RL2">',
        "<style>text{font-family:system-ui,sans-serif;text-anchor:middle}.title{font-size:14.5px;font-weight:600;"
        f"fill:{colours.text}}}.detail{{font-size:12.5px;fill:{colours.detail}}}"
        f".arrow{{fill:none;stroke:{colours.line};stroke-width:1.6}}.aside{{stroke-dasharray:5 4}}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colours.line}"/></marker></defs>',
    ]
    width, height = BOX
    for column, row, kind, title, detail in BOXES:
        x, y = COLUMNS[column], 14 + ROW * row
        dashed = ' stroke-dasharray="5 4"' if kind == "aside" else ""
        lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{colours.fills[kind]}" '
            f'stroke="{colours.line}"{dashed}/>'
        )
        middle = x + width / 2
        if title:
            lines.append(f'<text x="{middle}" y="{y + 24}" class="title">{title}</text>')
        lines.append(f'<text x="{middle}" y="{y + (43 if title else 33)}" class="detail">{detail}</text>')
    for path, is_aside in ARROWS:
        lines.append(f'<path class="arrow{" aside" * is_aside}" d="{path}" marker-end="url(#head)"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> None:
    for name, colours in VARIANTS.items():
        (IMAGES / f"how-{name}.svg").write_text(drawing(colours), encoding="utf-8")


if __name__ == "__main__":
    main()
