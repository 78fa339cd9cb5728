"""Formulas of the pages as SVG when the site is built, so that readers need neither JavaScript nor a network.

pymdownx.arithmatex marks `$...$` and ```math blocks; matplotlib's mathtext typesets them. It knows a part of LaTeX: a
formula that it cannot read fails the build. On GitHub the same text is typeset by MathJax.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

from matplotlib import rc_context
from matplotlib.path import Path
from matplotlib.textpath import TextPath

SIZE = 100
"""Size of the font in units of the drawing."""
SCALE = 1.12
"""Size of formulas in relation to the text around them, whose letters are wider."""
MARGIN = 4
"""Space around a formula, in the same units: curves may reach beyond their points."""
MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""A marked formula: inline as \\(...\\) in a span, or displayed as \\[...\\] in a div."""
COMMANDS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
"""Codes of matplotlib's paths -> commands of SVG's."""


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Return the HTML of a page of the site with its formulas drawn; called by mkdocs."""
    return MARKED.sub(_drawn, content)


def _drawn(match: re.Match[str]) -> str:
    kind, formula = match[1], html.unescape(match[2]).strip()
    drawing = svg(formula.replace(r"\frac", r"\dfrac") if kind == "div" else formula)
    return f'<{kind} class="formula">{drawing}</{kind}>'


@cache
def svg(formula: str) -> str:
    """Return a formula as inline SVG in the colour and size of the text around it.

    Raise ValueError for LaTeX that mathtext does not know.
    """
    with rc_context({"mathtext.fontset": "stix"}):
        path = TextPath((0, 0), f"${' '.join(formula.split())}$", size=SIZE)
    box = path.get_extents()
    left, bottom = box.x0 - MARGIN, box.y0 - MARGIN
    width, height = box.width + 2 * MARGIN, box.height + 2 * MARGIN
    em = SCALE / SIZE
    style = f"width:{width * em:.3f}em;height:{height * em:.3f}em;vertical-align:{bottom * em:.3f}em"
    view = f"{left:.1f} {-bottom - height:.1f} {width:.1f} {height:.1f}"
    label = html.escape(formula, quote=True)
    return f'<svg role="img" aria-label="{label}" style="{style}" viewBox="{view}"><path d="{_outline(path)}"/></svg>'


def _outline(path: Path) -> str:
    """Return the outline of `path` in SVG's language, whose vertical axis points down."""
    pieces = []
    for points, code in path.iter_segments(simplify=False):
        numbers = "" if code == Path.CLOSEPOLY else " ".join(f"{x:.1f} {-y:.1f}" for x, y in points.reshape(-1, 2))
        pieces.append(COMMANDS[code] + numbers)
    return "".join(pieces)
