"""How far checkpoints moved from their base (``pvec shift``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pvec.report.axes import XAxis
from pvec.report.dots import scatter
from pvec.report.figure import Figure, Table
from pvec.report.page import Chapter, Section
from pvec.report.sections.common import RunData
from pvec.report.sections.projections import (
    MEAN,
    NUMBER,
    PLACE,
    R,
    Summary,
    correlation_text,
    dot,
    interval_text,
)
from pvec.runs.names import model_label
from pvec.runs.summary import read_summary

_SHAPE = {
    "base": str,
    "shifts": [{**PLACE, "checkpoint": str, "shift": MEAN, "score": NUMBER}],
    "trends": [{**PLACE, "pearson": R, "spearman": R}],
}  # fmt: skip
"""What this page reads of a summary."""


def build(runs: Sequence[RunData]) -> Chapter:
    """Return one section per run."""
    sections = tuple(_shift(run, read_summary(run.path, shape=_SHAPE)) for run in runs)
    return Chapter(summary=" ".join(section.summary for section in sections), sections=sections)


def _shift(run: RunData, stored: Summary) -> Section:
    furthest = max(stored["shifts"], key=lambda item: abs(item["shift"]["mean"]))
    return Section(
        id=run.id,
        title=f"Finetuning shift from {stored['base']}",
        summary=(
            f"{model_label(furthest['checkpoint'])} moved furthest: "
            f"{interval_text(furthest['shift'])} along {furthest['vector']} at layer "
            f"{furthest['layer']}."
        ),
        notes=tuple(
            f"Shifts along {t['vector']} at layer {t['layer']} go with trait scores at rank "
            f"correlation {correlation_text(t['spearman'])} over {t['spearman']['n']} models."
            for t in stored["trends"]
        ),
        figures=tuple(_shift_figures(run, stored)),
        tables=(("Shifts", _shift_table(stored["shifts"])),),
        source=run.source,
        provenance=run.provenance(),
    )


def _shift_table(shifts: Sequence[Summary]) -> Table:
    rows = tuple(
        (
            shift["checkpoint"],
            shift["vector"],
            shift["layer"],
            *(shift["shift"][key] for key in ("mean", "low", "high")),
            shift["score"],
        )
        for shift in shifts
    )
    columns = ("checkpoint", "vector", "layer", "shift", "95 % low", "95 % high", "trait score")
    return Table(columns=columns, rows=rows)


def _shift_figures(run: RunData, stored: Summary) -> Iterator[Figure]:
    for trend in stored["trends"]:
        vector, layer = trend["vector"], trend["layer"]
        dots = [
            dot(model_label(item["checkpoint"]), item["shift"]["mean"], item["score"])
            for item in stored["shifts"]
            if item["vector"] == vector and item["layer"] == layer and item["score"] is not None
        ]
        if trend.get("base_score") is not None:
            dots.insert(0, dot(f"{model_label(stored['base'])} (base)", 0.0, trend["base_score"]))
        yield scatter(
            name=f"{run.id}_{vector}_layer{layer}_shift",
            title=f"Shift along {vector} at layer {layer} and trait score",
            caption=f"A point per model; r {correlation_text(trend['pearson'])}, by rank "
            f"{correlation_text(trend['spearman'])}.",
            x=XAxis(label="finetuning shift"),
            y_label="trait score",
            dots=dots,
        )
