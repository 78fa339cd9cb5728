"""Colours, dashes and layout of plots on all pages."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, which colour-blind people can distinguish, without yellow and black: one is lost on a light
# page, the other on a dark one. Dashes and markers repeat the distinction.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
DASHES = ("solid", "dash", "solid", "dot", "dashdot", "longdash")

# Greys; the page's style sheet overrides them for light and dark pages.
_GREY = "#80868f"
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'
_AXIS = {"gridcolor": "rgba(128,134,143,.25)", "zeroline": False, "automargin": True}
PLOT_LAYOUT: dict[str, Any] = {
    "template": "none",
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": _GREY, "size": 12, "family": _FONT},
    "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
    "hovermode": "x unified",
    "xaxis": {
        **_AXIS,
        "title": {"text": "step", "standoff": 6},
        "showgrid": False,
        "unifiedhovertitle": {"text": "step %{x}"},
        "spikethickness": 1,
        "spikedash": "solid",
        "spikecolor": _GREY,
    },
    "yaxis": dict(_AXIS),
}
PLOT_CONFIG = {"displayModeBar": False, "responsive": True}
