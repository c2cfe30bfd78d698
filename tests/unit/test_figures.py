"""The grammar of figures: axes that do not lie, intervals that are drawn, colours told apart."""

from __future__ import annotations

import io
import itertools
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from pvec import __version__
from pvec.cli.render import r_interval
from pvec.report.axes import SCORE_AXIS, Reference, Scale, XAxis, YAxis, exact
from pvec.report.dots import Dot, bars, scatter
from pvec.report.figure import Difference, Figure, Table
from pvec.report.figures import Level, Line, Panel, histogram, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.sections.common import RunData, correlation_text
from pvec.report.style import PALETTE, RAMP, SERIES, decimals, number, series_colours
from pvec.runs.store import Run
from pvec.stats import Correlation, Interval

SVG = "{http://www.w3.org/2000/svg}"

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = XYZ @ rgb / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > 0.008856, np.cbrt(ratio), (903.3 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def ciede2000(one: np.ndarray, other: np.ndarray) -> float:
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean_c = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    g = 0.5 * (1 - np.sqrt(mean_c**7 / (mean_c**7 + 25**7)))
    c1, c2 = np.hypot((1 + g) * a1, b1), np.hypot((1 + g) * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, (1 + g) * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    d_h = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn) / 2)
    l_m, c_m = (l1 + l2) / 2, (c1 + c2) / 2
    h_m = (h1 + turn / 2) % 360 if c1 * c2 else h1 + h2
    t = sum(
        weight * np.cos(np.radians(times * h_m + plus))
        for weight, times, plus in (
            (1, 0, 0), (-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.2, 4, -63),
        )
    )  # fmt: skip
    s_l = 1 + 0.015 * (l_m - 50) ** 2 / np.sqrt(20 + (l_m - 50) ** 2)
    s_c, s_h = 1 + 0.045 * c_m, 1 + 0.015 * c_m * t
    r = (
        -2
        * np.sqrt(c_m**7 / (c_m**7 + 25**7))
        * np.sin(np.radians(60 * np.exp(-(((h_m - 275) / 25) ** 2))))
    )
    d_l, d_c = (l2 - l1) / s_l, (c2 - c1) / s_c
    return float(np.sqrt(d_l**2 + d_c**2 + (d_h / s_h) ** 2 + r * d_c * d_h / s_h))


def distance(one: str, other: str, vision: str) -> float:
    seen = (lab(np.clip(VISION[vision] @ linear(colour), 0, 1)) for colour in (one, other))
    return ciede2000(*seen)


def sides(prefix: str, side: int) -> list[str]:
    return [pair[side] for name, pair in PALETTE.items() if name.startswith(prefix)]


def test_the_colour_difference_is_the_published_one() -> None:
    # Two pairs of Sharma, Wu and Dalal (2005), table 1.
    pairs = [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ]
    for one, other, expected in pairs:
        assert ciede2000(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_colours_are_told_apart_by_readers_with_colour_blindness(vision: str, side: int) -> None:
    series, ramp = sides("series-", side), sides("ramp-", side)
    assert min(distance(*pair, vision) for pair in itertools.combinations(series, 2)) > 12
    assert min(distance(*pair, vision) for pair in itertools.pairwise(ramp)) > 4
    lightness = [lab(np.clip(VISION[vision] @ linear(colour), 0, 1))[0] for colour in ramp]
    assert lightness == sorted(lightness, reverse=side == 0), "an order is an order of lightness"


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(side: int) -> None:
    def luminance(colour: str) -> float:
        return float((XYZ @ linear(colour))[1])

    paper = luminance(PALETTE["paper"][side])
    for name, pair in PALETTE.items():
        if name in {"paper", "grid"}:
            continue
        low, high = sorted((luminance(pair[side]), paper))
        least = 4.5 if name in {"ink", "muted"} else 2.8
        assert (high + 0.05) / (low + 0.05) > least, name


def test_series_with_an_order_take_the_ramp_from_end_to_end() -> None:
    assert series_colours(3, ordered=True) == [RAMP[0], RAMP[4], RAMP[7]]
    assert series_colours(2) == list(SERIES[:2])
    assert len(set(series_colours(8, ordered=True))) == 8


def point(mean: float, *, n: int = 40) -> Interval:
    return Interval(mean=mean, low=mean - 3, high=mean + 4, n=n, groups=8)


def chart(lines: Sequence[Line], **changes: object) -> Figure:
    fields: dict[str, object] = {
        "name": "c", "title": "Chart", "caption": "What it shows.", "x": XAxis(label="layer"),
        "panels": [Panel(label="evil", lines=lines)],
    }  # fmt: skip
    return line_chart(**(fields | changes))  # type: ignore[arg-type]


def test_layers_have_whole_ticks_however_many_there_are() -> None:
    for count in (3, 5, 9, 28, 80):
        line = Line(label="v", x=range(count), points=[exact(float(i)) for i in range(count)])
        canvas = chart([line]).canvas()
        canvas.draw_without_rendering()
        ticks = canvas.axes[0].get_xticks()
        assert all(float(tick).is_integer() for tick in ticks)
        labels = [label.get_text() for label in canvas.axes[0].get_xticklabels()]
        assert not any("." in label for label in labels)


def test_an_axis_covers_its_whole_scale_so_that_noise_is_no_structure() -> None:
    line = Line(label="v", x=(1, 2, 3), points=[exact(v) for v in (0.9992, 0.9995, 0.9998)])
    stability = chart([line], panels=[Panel(label="cosine", lines=[line], limits=(0.0, 1.0))])
    low, high = stability.canvas().axes[0].get_ylim()
    assert low <= 0
    assert high >= 1
    scores = chart([line], panels=[Panel(label="evil", lines=[line], limits=SCORE_AXIS)])
    assert list(scores.canvas().axes[0].get_yticks()) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize("count", [3, 30], ids=["bars", "bands"])
def test_intervals_are_drawn_where_they_exist_and_the_caption_says_so(count: int) -> None:
    from matplotlib.collections import LineCollection, PolyCollection

    known = Line(label="v", x=range(count), points=[point(20.0 + i) for i in range(count)])
    drawn = chart([known])
    (axis,) = drawn.canvas().axes
    found = [c for c in axis.collections if isinstance(c, LineCollection | PolyCollection)]
    assert len(found) == 1
    ends = np.concatenate([path.vertices for path in found[0].get_paths()])[:, 1]
    assert ends.min() == pytest.approx(17)
    assert ends.max() == pytest.approx(20 + count - 1 + 4)
    assert drawn.caption.endswith("95 % intervals; n = 40 per point.")
    bare = chart([Line(label="v", x=range(3), points=[exact(1.0)] * 3)])
    assert bare.caption == "What it shows."
    axis = bare.canvas().axes[0]
    assert not any(isinstance(c, LineCollection | PolyCollection) for c in axis.collections)


def test_one_missing_interval_hides_no_other() -> None:
    from matplotlib.collections import LineCollection

    points = [point(10.0), exact(20.0), point(30.0)]
    (axis,) = chart([Line(label="v", x=range(3), points=points)]).canvas().axes
    (found,) = (c for c in axis.collections if isinstance(c, LineCollection))
    assert [segment[:, 1].tolist() for segment in found.get_segments()] == [
        [7.0, 14.0], [20.0, 20.0], [27.0, 34.0],
    ]  # fmt: skip


def every_kind() -> list[Figure]:
    line = Line(label="layer 3", x=(-1.0, 0.0, 1.0), points=[point(v) for v in (2.0, 5.0, 60.0)])
    control = Line(label="random", x=(0.0, 1.0), points=[point(5.0), point(6.0)],
                   control_of="layer 3")  # fmt: skip
    axis = XAxis(
        label="coefficient",
        references=[Reference(x=1.0, label="picked")],
        top=Scale(label="norm / residual", factor=0.5),
    )
    words = {"title": "evil: dose", "caption": "c"}
    grid = Grid(columns=("coefficient", (-1.0, 1.0)), rows=("layer", ("2", "3")),
                values=((1.0, 90.0), (float("nan"), 40.0)), value_label="evil")  # fmt: skip
    dots = [Dot(group=g, x=exact(i), y=point(i * 20.0)) for i, g in enumerate(("none", "a lot"))]
    return [
        line_chart(name="lines", x=axis, panels=[
            Panel(label="evil", lines=[line, control], levels=[Level(value=point(85.0),
                                                                     label="prompt")])
        ], **words),
        histogram(name="counts", x=XAxis(label="evil"), groups=[("a", [1.0, 2.0]), ("b", [5.0])],
                  **words),
        scatter(name="dots", x=XAxis(label="projection"), y=YAxis(label="evil"), dots=dots,
                **words),
        bars(name="bars", label="shift", groups=["I", "II"],
             series={"evil": [point(-4.0), point(60.0)], "kind": [point(1.0), None]}, **words),
        heat_map(grid, name="cells", **words),
    ]  # fmt: skip


@pytest.mark.parametrize("figure", every_kind(), ids=lambda figure: figure.name)
def test_nothing_of_an_exported_figure_lies_over_another_part(figure: Figure) -> None:
    canvas = replace(figure, caption="What it shows. " * 20, source="model").canvas()
    canvas.draw_without_rendering()
    title, below = (text.get_window_extent() for text in canvas.texts)
    axes = [axis.get_tightbbox() for axis in canvas.axes]
    legends = [legend.get_window_extent() for legend in canvas.legends]
    lowest = min(box.y0 for box in axes if box is not None)
    assert all(box.y1 <= lowest + 1 and box.y0 >= below.y1 - 1 for box in legends)
    assert below.y0 >= 0
    assert below.y1 <= lowest
    assert max(box.y1 for box in axes if box is not None) <= title.y0 + 1
    assert title.y1 <= canvas.bbox.y1


@pytest.mark.parametrize("figure", every_kind(), ids=lambda figure: figure.name)
def test_every_mark_says_its_numbers(figure: Figure) -> None:
    root = ET.fromstring(figure.themed_svg())
    titles = [node.text or "" for node in root.iter(f"{SVG}title")]
    expected = {"lines": 7, "counts": 30, "dots": 2, "bars": 3, "cells": 3}
    assert len(titles) == expected[figure.name]
    assert all(re.search(r"\d", title) for title in titles)
    if figure.name == "lines":
        assert "layer 3: evil 60 (57 to 64), n = 40, coefficient 1" in titles
        assert "picked: 1" in titles
    assert root.get("aria-label") == "evil: dose"


@pytest.mark.parametrize("figure", every_kind()[:4], ids=lambda figure: figure.name)
def test_each_series_has_a_key_and_marks_that_go_with_it(figure: Figure) -> None:
    root = ET.fromstring(figure.themed_svg())
    groups = [g for g in root.iter(f"{SVG}g") if g.get("data-series") is not None]
    keys = {g.get("data-series") for g in groups if g.get("class") == "key"}
    marks = {g.get("data-series") for g in groups if g.get("class") != "key"}
    assert keys == marks
    assert len(keys) > 1


@pytest.mark.parametrize("figure", every_kind(), ids=lambda figure: figure.name)
def test_an_exported_figure_says_what_it_is_and_where_it_is_from(figure: Figure) -> None:
    from dataclasses import replace

    figure = replace(figure, source="tiny · run steer-evil · 2026-01-02")
    root = ET.fromstring(figure.svg())
    text = " ".join("".join(node.itertext()) for node in root.iter(f"{SVG}text"))
    for words in ("evil: dose", "tiny · run steer-evil · 2026-01-02", f"pvec {__version__}"):
        assert words in text
    image = figure.png()
    assert b"run steer-evil" in image, "in the PNG's text chunks too"
    height, width, _ = matplotlib.image.imread(io.BytesIO(image), format="png").shape
    assert height > 0.2 * width
    page = ET.fromstring(figure.themed_svg())
    inside = ["".join(node.itertext()) for node in page.iter(f"{SVG}text")]
    assert not any("run steer-evil" in words for words in inside), "the page says it itself"


def test_a_bar_too_small_to_see_has_its_value_written() -> None:
    drawn = bars(
        name="b", title="t", caption="c", label="shift", groups=["tiny", "small", "large"],
        series={"evil": [exact(0.01), exact(2.5), exact(900.0)]},
    )  # fmt: skip
    written = [text.get_text() for text in drawn.canvas().axes[0].texts]
    assert written == ["0.0100", "2.5", "900.0"]


def test_numbers_of_a_column_have_the_same_decimals_and_a_true_minus() -> None:
    table = Table(
        columns=("what", "value", "n", "score", "change"),
        rows=(
            ("a", 0.0323, 12_000, point(89.6), Difference.of(point(-2.0))),
            ("b", -2.4, None, exact(2.4), None),
            ("c", 89.6, 3, exact(0.03), Difference.of(exact(1.0))),
        ),
    )
    assert table.numeric() == [False, True, True, True, True]
    assert table.shown() == [
        ["a", "0.0", "12,000", "89.6 (86.6 to 93.6)", "\u22122 (\u22125 to +2)"],
        ["b", "\u22122.4", "–", "2.4", "–"],
        ["c", "89.6", "3", "0.0", "+1"],
    ]


def test_decimals_follow_the_largest_number() -> None:
    assert [decimals([v]) for v in (3.0, 89.6, 2.44, 0.5, 0.0323, 1234.5)] == [0, 1, 2, 3, 4, 1]
    assert number(-0.0) == "0"
    assert number(-0.04, 1) == "0.0"
    assert number(1234.5, 1, sign=True) == "+1,234.5"


def test_a_correlation_of_few_points_is_not_stated() -> None:
    known = {"r": 0.998, "low": 0.9, "high": 0.9999, "n": 4}
    assert correlation_text(known) == "not given (n = 4)"
    assert correlation_text({**known, "n": 7}) == "not given (n = 7)"
    assert r_interval(Correlation(**known, missing=0)) == "too few (4)"
    assert r_interval(Correlation(**{**known, "n": 8}, missing=0)) == "1.00 [0.90, 1.00]"
    assert correlation_text({**known, "n": 40}) == "> 0.99 (0.90 to 1.00, n = 40)"
    low = {"r": -0.18, "low": -0.5, "high": 0.2, "n": 40}
    assert correlation_text(low) == "\u22120.18 (\u22120.50 to 0.20, n = 40)"


def test_an_axis_of_scores_goes_from_0_to_100_whatever_was_scored() -> None:
    dots = [Dot(group="a", x=exact(v), y=exact(50.0 + v)) for v in (0.0, 1.0)]
    (axis,) = scatter(
        name="d", title="t", caption="c", x=XAxis(label="x"), dots=dots,
        y=YAxis(label="evil score", limits=SCORE_AXIS),
    ).canvas().axes  # fmt: skip
    assert list(axis.get_yticks()) == [0, 25, 50, 75, 100]
    assert axis.get_ylim() == (-4, 104)


def test_projections_are_drawn_beside_the_extractions_means_and_in_residual_norms(
    tmp_path: Path,
) -> None:
    known = {"residual_norm": 200.0, "proj_prompt_neg": -30.0, "proj_prompt_pos": 90.0}
    with Run.open_or_create(tmp_path / "run", identity={"model": "m"}, kind="k") as run:
        run.begin_session(command=["pvec"])
        run.update_manifest(projection_axes={"evil_layer3": known})
        data = RunData(run=run, judge=None)
        axis = data.projection_axis("projection", "evil", 3, of="prompt")
        assert axis.top == Scale(label="in mean residual norms", factor=0.005)
        assert axis.references == [
            Reference(x=-30.0, label="negative"), Reference(x=90.0, label="positive"),
        ]  # fmt: skip
        assert data.projection_axis("difference", "evil", 3, of=None).references == []
        unknown = data.projection_axis("projection", "evil", 4, of="prompt")
        assert unknown == XAxis(label="projection", references=[], top=None)
    dots = [Dot(group="a", x=exact(v), y=exact(50.0)) for v in (-100.0, 0.0, 100.0)]
    drawn = scatter(
        name="d", title="t", caption="c", x=axis, y=YAxis(label="evil"), dots=dots
    ).canvas()
    (second,) = drawn.axes[0].child_axes
    drawn.draw_without_rendering()
    low, high = drawn.axes[0].get_xlim()
    assert second.get_xlim() == pytest.approx((low / 200, high / 200))
    assert [text.get_text() for text in drawn.axes[0].texts[-2:]] == ["negative", "positive"]
