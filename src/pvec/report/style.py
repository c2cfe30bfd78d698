"""How figures look: colours, fonts, and how marks become elements of an SVG document.

Every colour stands here once, for light and for dark pages. Matplotlib draws with the light ones;
in a page they are replaced by CSS variables (``themed``, ``css_variables``). Series and ramp can be
told apart by readers with deuteranopia or protanopia; a test simulates both.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

_STRUCTURE = {
    "ink": ("#1c2330", "#e6e9ef"),
    "muted": ("#606a79", "#98a2b3"),
    "grid": ("#dfe3ea", "#2f3746"),
    "paper": ("#fdfdfe", "#1a1f29"),
}
_SERIES = (
    ("#2367c5", "#6fa6ff"), ("#ed5310", "#ee8e44"), ("#04796a", "#27d19d"),
    ("#c36e96", "#d4a1c0"), ("#1b2450", "#f0f4f4"), ("#958962", "#fde433"),
    ("#6a2a10", "#8167d1"),
)  # fmt: skip
_RAMP = (
    ("#25a883", "#28708e"), ("#1f948c", "#228d8d"), ("#26828e", "#1fa187"),
    ("#2e6d8e", "#32b67a"), ("#39568c", "#5ac864"), ("#433d84", "#8ed645"),
    ("#482071", "#c8e020"), ("#440154", "#fdf6a8"),
)  # fmt: skip
PALETTE = {
    **_STRUCTURE,
    **{f"series-{i}": pair for i, pair in enumerate(_SERIES)},
    **{f"ramp-{i}": pair for i, pair in enumerate(_RAMP)},
}
"""CSS variable → its colour on a light and on a dark page."""

INK, MUTED, GRID, PAPER = (light for light, _ in _STRUCTURE.values())
SERIES = tuple(light for light, _ in _SERIES)
"""Colours of series without an order; told apart also by marker."""
RAMP = tuple(light for light, _ in _RAMP)
"""Colours of series with an order (layers, degrees): the further on, the stronger the contrast."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CELLS = {"trait": "YlOrBr", "quality": "GnBu", "signed": "RdBu_r"}
"""Colour maps of cells: how much of a trait, how good, and what has a sign."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
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
    "legend.fontsize": 11,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}
"""A figure is 360 units wide: on a phone, where it fills the screen, 11 of them are 11 pixels."""

_SVG = "http://www.w3.org/2000/svg"
ET.register_namespace("", _SVG)
ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def series_colours(count: int, *, ordered: bool = False) -> list[str]:
    """Return a colour for each of ``count`` series; ``ordered`` ones are spread over the ramp."""
    if not ordered:
        return [SERIES[i % len(SERIES)] for i in range(count)]
    step = (len(RAMP) - 1) / max(1, count - 1)
    return [RAMP[round(i * step)] for i in range(count)]


def css_variables() -> str:
    """Return the style sheet that gives every colour its value, light and dark."""
    light, dark = (
        " ".join(f"--{name}: {pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1)
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def themed(svg: str, *, label: str) -> str:
    """Return the ``<svg>`` element for a page: colours as CSS variables, scaling to its box, and
    ``label`` as its name for screen readers.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, (colour, _) in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    svg = re.sub(r"font: ?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    root = ET.fromstring(svg)  # noqa: S314 (written by matplotlib)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    for title in root.findall(f"{{{_SVG}}}title"):  # it would be shown wherever no mark is
        root.remove(title)
    root.set("role", "group")
    root.set("aria-label", printable(label))
    return ET.tostring(root, encoding="unicode")


def name_marks(
    artist: Any, titles: Sequence[str] = (), *, series: int | None = None, key: bool = False
) -> None:
    """Say what an artist shows: a title for each of its marks, and the number of its series.

    Without titles it belongs to the series, as a line or an interval does. The ``key`` of a series,
    in a legend, lets the readers of a page toggle it.
    """
    said = {"titles": list(map(printable, titles)), "series": series, "key": key}
    artist.set_gid(json.dumps(said))


def with_titles(svg: str) -> str:
    """Return the document with what ``name_marks`` said: ``<title>`` and ``data-series``."""
    root = ET.fromstring(svg)  # noqa: S314 (written by matplotlib)
    for group in root.iter(f"{{{_SVG}}}g"):
        if not group.get("id", "").startswith("{"):
            continue
        said = json.loads(group.attrib.pop("id"))
        if said["series"] is not None:
            group.set("data-series", str(said["series"]))
        if said["key"]:
            group.set("class", "key")
        if said["titles"]:
            for mark, title in zip(_marks(group), said["titles"], strict=True):
                ET.SubElement(mark, f"{{{_SVG}}}title").text = title
    return ET.tostring(root, encoding="unicode")


def _marks(group: ET.Element) -> list[ET.Element]:
    """Return the elements that draw a group's marks, however matplotlib has written them."""
    defined = {element for defs in group.iter(f"{{{_SVG}}}defs") for element in defs.iter()}
    for tag in ("use", "path"):
        found = [mark for mark in group.iter(f"{{{_SVG}}}{tag}") if mark not in defined]
        if found:
            return found
    return []


def printable(text: str) -> str:
    """Return ``text`` with characters replaced that no picture or page may hold: control
    characters, and those that turn the direction of the text around.
    """
    return _UNPRINTABLE.sub("\ufffd", text)


def true_minus(name: str) -> str:
    """Return a name as it is shown: ``coef -1`` of a condition with a true minus sign."""
    return re.sub(r"(?<= )-(?=\d)", "\u2212", name)


def decimals(values: Sequence[float]) -> int:
    """Return how many decimals show ``values`` alike: three digits of the largest, at least one.

    Whole numbers have none; missing ones do not count.
    """
    known = [abs(value) for value in values if math.isfinite(value)]
    if all(value == int(value) for value in known):
        return 0
    return max(1, 2 - math.floor(math.log10(max(known))))


def short_number(value: float) -> str:
    """Return a value of x (a layer, a coefficient, a step) in as few digits as it needs."""
    text = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    return text.replace("-", "\u2212")


def number(value: float | None, digits: int | None = None, *, sign: bool = False) -> str:
    """Return a number for people: a true minus sign, thousands grouped, a dash where missing.

    ``digits`` are its decimals (default: as it needs); ``sign`` also writes a plus.
    """
    if value is None or math.isnan(value):
        return "–"
    if digits is None:
        digits = decimals([value])
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    return text.replace("-", "\u2212") if float(text.replace(",", "")) else text.lstrip("+-")
