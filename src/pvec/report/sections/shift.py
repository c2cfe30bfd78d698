"""How far checkpoints moved from their base (``pvec shift``; paper, figure 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal

from pvec.report.axes import SCORE_AXIS, YAxis, exact
from pvec.report.dots import Dot, bars, scatter
from pvec.report.figure import Difference, Figure, Table, interval_text
from pvec.report.page import Section
from pvec.report.sections.common import (
    MEAN,
    NUMBER,
    PLACE,
    R,
    RunData,
    Summary,
    correlation_text,
    interval_of,
)
from pvec.runs.names import model_label
from pvec.runs.summary import read_summary
from pvec.stats import FEW_PAIRS, Interval

SHIFT_SHAPE: Mapping[str, Any] = {
    "base": str,
    "shifts": [{**PLACE, "checkpoint": str, "shift": MEAN, "score": NUMBER, ...: (MEAN, NoneType)}],
    "trends": [{**PLACE, "pearson": R, "spearman": R, ...: (MEAN, *NUMBER)}],
}  # fmt: skip
"""What this page reads of a summary."""


def read(run: RunData) -> tuple[RunData, Summary]:
    """Return a run with its numbers."""
    return run, read_summary(run.path, shape=SHIFT_SHAPE)


def section(found: tuple[RunData, Summary]) -> Section:
    """Return what a page shows of one base and its finetunes."""
    run, stored = found
    furthest = max(stored["shifts"], key=lambda item: abs(item["shift"]["mean"]))
    notes = [_trend_note(trend) for trend in stored["trends"]]
    if not stored["trends"]:
        notes.append(
            "Trait scores of fewer than three of these models are known: after steer-eval without "
            "a vector on three or more of them, the same command compares shifts with scores."
        )
    return Section(
        title=f"Finetuning shift from {model_label(stored['base'])}",
        summary=(
            f"{model_label(furthest['checkpoint'])} moved furthest: "
            f"{interval_text(interval_of(furthest['shift']), sign=True)} along "
            f"{furthest['vector']} at layer {furthest['layer']}."
        ),
        notes=tuple(notes),
        figures=(*_trend_figures(run, stored), _bars_figure(run, stored)),
        tables=(("Shifts", _shift_table(stored["shifts"])),),
    )


def _trend_note(trend: Summary) -> str:
    """Say how shift and score correlate, of models enough."""
    place = f"along {trend['vector']} at layer {trend['layer']}"
    if trend["pearson"]["n"] < FEW_PAIRS:
        return (
            f"{trend['pearson']['n']} models are too few to state how shift {place} and trait "
            + (f"score correlate (from {FEW_PAIRS} on).")
        )
    return (
        f"Shift {place} and trait score: r {correlation_text(trend['pearson'])}, by rank "
        f"{correlation_text(trend['spearman'])}."
    )


def _shift_table(shifts: Sequence[Summary]) -> Table:
    rows = tuple(
        (
            model_label(shift["checkpoint"]),
            shift["vector"],
            shift["layer"],
            Difference.of(interval_of(shift["shift"])),
            shift["shift"]["n"],
            _score(shift, "score"),
        )
        for shift in shifts
    )
    columns = ("checkpoint", "vector", "layer", "shift (95 %)", "prompts", "trait score (95 %)")
    return Table(columns=columns, rows=rows)


def _trend_figures(run: RunData, stored: Summary) -> Iterator[Figure]:
    """Yield the paper's figure 6: per vector, the shift of each model and its trait score."""
    for trend in stored["trends"]:
        vector, layer = trend["vector"], trend["layer"]
        points = [
            (model_label(item["checkpoint"]), interval_of(item["shift"]), score)
            for item in _at(stored["shifts"], trend)
            if (score := _score(item, "score")) is not None
        ]
        if (base_score := _score(trend, "base")) is not None:
            base = f"{model_label(stored['base'])} (base)"
            points.insert(0, (base, exact(0.0), base_score))
        yield scatter(
            name=f"{run.id}_{vector}_layer{layer}_shift",
            title=f"Shift along {vector} at layer {layer} and trait score",
            caption=f"A point per model. {_trend_note(trend)}",
            x=run.projection_axis(f"shift along {vector}", vector, layer, of=None),
            y=YAxis(label="trait score", limits=SCORE_AXIS),
            dots=[Dot(group=name, label=name, x=x, y=y) for name, x, y in points],
        )


def _bars_figure(run: RunData, stored: Summary) -> Figure:
    """Return the shift of every checkpoint along every vector."""
    names = list(dict.fromkeys(item["checkpoint"] for item in stored["shifts"]))
    places = list(dict.fromkeys((item["vector"], item["layer"]) for item in stored["shifts"]))
    by_place: dict[str, Sequence[Interval | None]] = {}
    for vector, layer in places:
        moved = {
            item["checkpoint"]: interval_of(item["shift"])
            for item in _at(stored["shifts"], {"vector": vector, "layer": layer})
        }
        by_place[f"{vector}, layer {layer}"] = [moved.get(name) for name in names]
    return bars(
        name=f"{run.id}_shifts",
        title="Shift of each model"
        + (f" along {next(iter(by_place))}" if len(places) == 1 else ""),
        caption="Mean activation of the last prompt token over the prompts, finetuned minus base, "
        "projected on the vector.",
        label="shift",
        groups=[model_label(name) for name in names],
        series=by_place,
    )


def _score(item: Summary, name: Literal["score", "base"]) -> Interval | None:
    """Return a trait score, with its interval where the run is new enough to hold it."""
    if item.get(f"{name}_interval") is not None:
        return interval_of(item[f"{name}_interval"])
    score = item.get("base_score" if name == "base" else name)
    return None if score is None else exact(score)


def _at(shifts: Sequence[Summary], place: Mapping[str, Any]) -> list[Summary]:
    return [
        item
        for item in shifts
        if item["vector"] == place["vector"] and item["layer"] == place["layer"]
    ]


def overview(runs: Sequence[tuple[RunData, Summary]]) -> Section:
    """Return the section that compares several bases: the furthest shift along each vector."""
    vectors = list(dict.fromkeys(i["vector"] for _, stored in runs for i in stored["shifts"]))
    furthest: list[dict[str, Interval]] = []
    for _, stored in runs:
        ordered = sorted(stored["shifts"], key=lambda item: abs(item["shift"]["mean"]))
        furthest.append({item["vector"]: interval_of(item["shift"]) for item in ordered})
    names = [f"{model_label(stored['base'])} ({run.id})" for run, stored in runs]
    return Section(
        id="shifts",
        title="Finetuning shifts, model by model",
        summary=f"The shifts of finetunes of {len(runs)} base models.",
        figures=(
            bars(
                name="shifts_by_model",
                title="Furthest shift from each base model",
                caption="The checkpoint that moved furthest, in each model's own projections.",
                label="shift",
                groups=names,
                series={vector: [found.get(vector) for found in furthest] for vector in vectors},
            ),
        ),
        source=", ".join(run.source for run, _ in runs),
    )
