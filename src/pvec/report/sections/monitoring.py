"""Prompts monitored before they are answered (``pvec monitor``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pvec.report.axes import SCORE_AXIS, YAxis, exact
from pvec.report.dots import Dot, scatter
from pvec.report.figure import Figure, Table
from pvec.report.page import Section
from pvec.report.sections.common import NUMBER, PLACE, R, RunData, Summary, correlation_text
from pvec.runs.summary import read_summary

_SHAPE = {
    "columns": [
        {**PLACE, "metric": str, "overall": R, "within": R, "same_question": R}
    ],
    "points": {
        ...: [{"condition": str, "score": NUMBER, "projections": {...: NUMBER}}]
    },
}  # fmt: skip
"""What this page reads of a summary."""

_PARTS = {"overall": "overall", "within": "within condition", "same_question": "within question"}
"""Correlations of a monitored vector, and what the table calls them."""


def section(run: RunData) -> Section:
    """Return what a page shows of monitored prompts."""
    stored = read_summary(run.path, shape=_SHAPE)
    columns = stored["columns"]
    suggested = [column for column in columns if column.get("suggested")]
    return Section(
        title=f"{run.trait}: prompts monitored on {run.model}",
        summary=" ".join(map(_monitor_summary, suggested or columns[:1])),
        notes=_monitor_notes(columns),
        figures=tuple(_monitor_figures(run, stored)),
        tables=(("Correlation with trait scores", _monitor_table(stored["columns"])),),
    )


def _monitor_summary(column: Summary) -> str:
    return (
        f"Before an answer exists, {column['vector']} at layer {column['layer']} predicts its "
        f"{column['metric']} score at r {correlation_text(column['overall'])} over all prompts, "
        f"{correlation_text(column['within'])} within a condition and "
        f"{correlation_text(column['same_question'])} within a question."
    )


def _monitor_notes(columns: Sequence[Summary]) -> tuple[str, ...]:
    """Say where the layer comes from: the best of several would flatter the method."""
    notes = [
        f"Layer {column['layer']} is the one that {column['vector']} suggests for prompts, from "
        "its own extraction, whatever these scores say."
        for column in columns
        if column.get("suggested")
    ]
    return (
        *notes,
        "Within a condition the conditions' own differences cannot help, as each one's means are "
        "subtracted first; within a question (asked under several conditions) only they can. "
        "Intervals of correlations are Fisher's.",
    )


def _monitor_table(columns: Sequence[Summary]) -> Table:
    rows = tuple(
        (
            column["vector"],
            column["layer"],
            column["metric"],
            *(correlation_text(column[part]) for part in _PARTS),
            column["overall"]["n"],
        )
        for column in columns
    )
    parts = (f"r {name} (95 %)" for name in _PARTS.values())
    return Table(columns=("vector", "layer", "score", *parts, "prompts"), rows=rows)


def _monitor_figures(run: RunData, stored: Summary) -> Iterator[Figure]:
    for column in stored["columns"]:
        vector, layer = column["vector"], column["layer"]
        yield scatter(
            name=f"{run.id}_{vector}_layer{layer}_prompts",
            title=f"{vector} at the last prompt token, layer {layer}",
            caption="A point per prompt, a colour per condition; r "
            f"{correlation_text(column['overall'])} over all, "
            f"{correlation_text(column['within'])} within conditions, "
            f"{correlation_text(column['same_question'])} within questions.",
            x=run.projection_axis(
                "projection of the last prompt token", vector, layer, of="prompt"
            ),
            y=YAxis(label=f"{column['metric']} score", limits=SCORE_AXIS),
            style="ordered"
            if len({p["condition"] for p in stored["points"][vector]}) > 2
            else "plain",
            dots=[
                Dot(
                    group=point["condition"],
                    x=exact(point["projections"][str(layer)]),
                    y=exact(point["score"]),
                )
                for point in stored["points"][vector]
            ],
        )
