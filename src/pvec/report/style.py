"""How figures look: colours, fonts, and what of them follows the page's light or dark theme.

Matplotlib draws with the plain colours below. In a page the structural ones are replaced by CSS
variables (``themed``), so that the page also works in the dark.
"""

from __future__ import annotations

import re
from typing import Any

INK = "#1c2330"
MUTED = "#66707f"
GRID = "#dfe3ea"
PAPER = "#fdfdfe"
SERIES = ("#c2452d", "#2563a8", "#3d8350", "#8a5fb0", "#b07a1e", "#1f8a94", "#a83f74", "#5c6470")
"""Line colours, in the order in which series are drawn; told apart also by marker."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def themed(svg: str) -> str:
    """Return the ``<svg>`` element for a page: colours as CSS variables, scaling to its box."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    svg = re.sub(r"font: ?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" ?([^>]*?)height="[^"]*"',
        r'<svg role="img" \1\2',
        svg,
        count=1,
    )


def printable(text: str) -> str:
    """Return ``text`` with characters replaced that no picture or page may hold: control
    characters, and those that turn the direction of the text around.
    """
    return _UNPRINTABLE.sub("\ufffd", text)
