"""Projections token by token (``pvec project --tokens``), and how they drift over the turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pvec.report.axes import XAxis, exact
from pvec.report.figure import Figure, interval_text
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.page import Section, Widget
from pvec.report.sections.common import RunData
from pvec.report.style import number
from pvec.report.token_view import PASSAGE, TokenView, token_view
from pvec.runs.summary import read_summary
from pvec.runs.tokens import TokenRecord, read_tokens
from pvec.stats import Interval, grouped_mean

_SHAPE = {"data": str, "turns": str, "columns": [{"vector": str, "layer": int}]}


def section(run: RunData) -> Section:
    """Return what a page shows of a file, token by token."""
    stored = read_summary(run.path, shape=_SHAPE)
    records = list(read_tokens(run.path))
    columns = [f"{c['vector']}, layer {c['layer']}" for c in stored["columns"]]
    axes = [_axis(run, c["vector"], c["layer"]) for c in stored["columns"]]
    view = token_view(records, columns, everything=run.everything)
    for column, axis in zip(view.data["columns"], axes, strict=True):
        column["means"] = [{"label": r.label, "value": _number(r.x)} for r in axis.references]
    data = Path(stored["data"]).name
    widgets = [_tokens(run, records, view)]
    figures: tuple[Figure, ...] = ()
    drift: list[list[Interval]] = []
    if stored["turns"] == "each":
        drift = [_drift(records, column) for column in range(len(columns))]
        view.data["turns"] = [_turns_json(points) for points in drift]
        widgets.insert(0, _turns(run))
        figures = (_drift_figure(run, axes, drift),)
    return Section(
        title=f"{data}: {'drift over turns' if drift else 'every token'} on {run.model}",
        summary=_drift_sentence(columns, drift)
        + _summary_sentence(data, records, [] if drift else columns, view),
        figures=figures,
        widgets=tuple(widgets),
    )


def _summary_sentence(
    data: str, records: Sequence[TokenRecord], columns: Sequence[str], view: TokenView
) -> str:
    tokens = sum(len(record.token_ids) for record in records)
    text = f"{data} has {len(records):,} answers with {tokens:,} tokens."
    for place, name in enumerate(columns):
        top = view.data["top"][place]["high"]
        if top:
            record, column = records[top[0]["answer"]], view.data["columns"][place]
            text += (
                f" The highest passage along {name} is in line {record.line:,} "
                f"({number(top[0]['value'], column['digits'])}; median of all tokens "
                f"{number(column['centre'], column['digits'])})."
            )
    return text


def _drift_sentence(columns: Sequence[str], drift: Sequence[Sequence[Interval]]) -> str:
    """Say how the mean moves from the first turn to the last that several conversations have."""
    text = ""
    for name, points in zip(columns, drift, strict=False):
        last = max((t for t, point in enumerate(points) if not math.isnan(point.low)), default=0)
        if last:
            text += (
                f"From turn 1 to turn {last + 1} the mean projection along {name} goes from "
                f"{interval_text(points[0])} to {interval_text(points[last])}. "
            )
    return text


def _axis(run: RunData, vector: str, layer: int) -> XAxis:
    """Return the axis of a column, with the extraction's negative and positive answers on it."""
    return run.projection_axis(f"{vector}, layer {layer}", vector, layer, of="response")


def _tokens(run: RunData, records: Sequence[TokenRecord], view: TokenView) -> Widget:
    notes = [
        "Colour shows a token's projection: orange above the median of all tokens of this file, "
        f"blue below it. The highest passage ({PASSAGE} tokens) of each answer is underlined.",
    ]
    if "think" in view.data:
        notes.append("Reasoning is in italics before the answer; means are those of the answer.")
    if view.opened < len(records):
        notes.append(
            f"This page holds the tokens of {view.opened:,} of {len(records):,} answers: the most "
            "extreme ones and an even spread of the others. All are listed; for all tokens write "
            "the page with --beside, which puts them into files beside it."
        )
    if run.everything:
        notes.append("The tokens are in files beside this page: keep them together.")
    return Widget(
        id=f"{run.id}-tokens",
        kind="tokens",
        title="Answers, token by token",
        notes=tuple(notes),
        data=view.data,
        parts=view.parts,
        beside=f"{run.id}-tokens" if run.everything else "",
        noscript=f"The numbers are in {run.path.name}/part-*.npz.",
    )


def _turns(run: RunData) -> Widget:
    return Widget(
        id=f"{run.id}-turns",
        kind="turns",
        title="Drift over the turns of conversations",
        notes=(
            "Each thin line is a conversation; the thick line is the mean of those that have the "
            "turn, with its 95 % interval. Choose a line or a turn to read it.",
        ),
        data={"source": f"{run.id}-tokens"},
        noscript="The figure and its numbers are in the page.",
    )


def _drift(records: Sequence[TokenRecord], column: int) -> list[Interval]:
    """Return the mean over conversations for turn 1, 2, …, each with its interval."""
    turns: dict[int, list[float]] = {}
    for record in records:
        values = record.answer_values[:, column]
        mean = float(values.mean(dtype=np.float64)) if len(values) else float("nan")
        turns.setdefault(record.turn, []).append(mean)
    return [grouped_mean(turns[t], groups=range(len(turns[t]))) for t in sorted(turns)]


def _turns_json(points: Sequence[Interval]) -> list[dict[str, float | int | None]]:
    return [
        {
            "mean": _number(point.mean),
            "low": _number(point.low),
            "high": _number(point.high),
            "n": point.n,
        }
        for point in points
    ]


def _drift_figure(
    run: RunData, axes: Sequence[XAxis], drift: Sequence[Sequence[Interval]]
) -> Figure:
    panels = [
        Panel(
            label=axis.label,
            lines=[Line(label=axis.label, x=range(1, len(points) + 1), points=points)],
            levels=[Level(label=f"{r.label} answers", value=exact(r.x)) for r in axis.references],
            right=axis.top,
        )
        for axis, points in zip(axes, drift, strict=True)
    ]
    return line_chart(
        name=f"{run.id}_drift",
        title="Mean projection by turn",
        caption="Mean over the conversations that have the turn, with its 95 % interval; later "
        "turns rest on fewer conversations (n is in the table)."
        + (
            " Horizontal lines: the extraction's mean answers."
            if any(axis.references for axis in axes)
            else ""
        ),
        x=XAxis(label="turn"),
        panels=panels,
    )


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None
