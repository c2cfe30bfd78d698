"""Projections: training data screened, prompts monitored, checkpoints that moved."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from pvec.documents import DocumentError, read_text
from pvec.errors import StoreError
from pvec.report.axes import Reference, XAxis, exact
from pvec.report.dots import Dot, scatter
from pvec.report.figure import Figure, Table
from pvec.report.figures import histogram
from pvec.report.page import Answer, Chapter, Section
from pvec.report.sections.common import RunData
from pvec.runs.names import model_label
from pvec.runs.summary import DIFF_KIND, PROMPTS_KIND, SHIFT_KIND, read_summary

_Summary = Mapping[str, Any]

_NUMBER = (float, NoneType)
_MEAN = {"mean": _NUMBER, "low": _NUMBER, "high": _NUMBER, "n": int}
_R = {"r": _NUMBER, "low": _NUMBER, "high": _NUMBER, "n": int}
_PLACE = {"vector": str, "layer": int}
_SHAPES = {
    DIFF_KIND: {
        "data": str,
        "natural": str,
        "percentile": float,
        "kept": (str, NoneType),
        **dict.fromkeys(("rows", "unanswered", "removed_rows"), int),
        "columns": [{
            **_PLACE,
            "score": {"mean": _MEAN, "auc": _NUMBER, "threshold": _NUMBER, "above": int,
                      "reference": (_MEAN, NoneType)},
            "agreement": (_R, NoneType),
        }],
        "suspicious": [
            {"line": int, "question": str, "response": str, "natural": str,
             "differences": {...: _NUMBER}}
        ],
    },
    PROMPTS_KIND: {
        "columns": [
            {**_PLACE, "metric": str, "overall": _R, "within": _R, "same_question": _R}
        ],
        "points": {
            ...: [{"condition": str, "score": _NUMBER, "projections": {...: _NUMBER}}]
        },
    },
    SHIFT_KIND: {
        "base": str,
        "shifts": [{**_PLACE, "checkpoint": str, "shift": _MEAN, "score": _NUMBER}],
        "trends": [{**_PLACE, "pearson": _R, "spearman": _R}],
    },
}  # fmt: skip
"""What this page reads of a summary."""

_PARTS = {"overall": "overall", "within": "within condition", "same_question": "within question"}
"""Correlations of a monitored vector, and what the table calls them."""


def build(runs: Sequence[RunData]) -> Chapter:
    """Return one section per run, by its kind."""
    makers: dict[str, Callable[[RunData, _Summary], Section]] = {
        DIFF_KIND: _screening,
        PROMPTS_KIND: _monitoring,
        SHIFT_KIND: _shift,
    }
    sections = tuple(
        makers[run.kind](run, read_summary(run.path, shape=_SHAPES[run.kind])) for run in runs
    )
    return Chapter(summary=" ".join(section.summary for section in sections), sections=sections)


def _screening(run: RunData, stored: _Summary) -> Section:
    data = Path(stored["data"]).name
    columns = stored["columns"]
    return Section(
        id=run.id,
        title=f"{data}: screened on {run.model}",
        summary=_screening_summary(stored, data),
        notes=tuple(_screening_notes(stored)),
        figures=tuple(_difference_figures(run, stored)),
        tables=(("Data set by vector", _screening_table(columns)),),
        answers=tuple(_suspicious(stored)),
        compare=("model's own answer", "training response"),
        provenance=run.provenance(),
    )


def _screening_summary(stored: _Summary, data: str) -> str:
    furthest = max(stored["columns"], key=lambda c: c["score"]["mean"]["mean"] or float("-inf"))
    text = (
        f"{data} points furthest along {furthest['vector']} at layer {furthest['layer']}: "
        f"{_interval(furthest['score']['mean'])} beyond the model's own answers."
    )
    if stored["kept"] is not None:
        text += f" {stored['removed_rows']:,} of {stored['rows']:,} samples were removed."
    return text


def _screening_notes(stored: _Summary) -> Iterator[str]:
    how = {
        "generate": "Every prompt has a generated natural answer.",
        "subset": "Natural projections were generated for a share of the prompts and predicted for "
        "the others from the last prompt token.",
        "prompt": "The last prompt token's projection stands for a natural answer's: compare "
        "differences between data sets, their size means nothing.",
    }
    yield how[stored["natural"]]
    for column in stored["columns"]:
        if column["agreement"] is not None:
            yield (
                f"Predicted differences along {column['vector']} at layer {column['layer']} agree "
                f"with generated ones at r {column['agreement']['r']:.2f}."
            )
    if stored["unanswered"]:
        yield f"{stored['unanswered']} samples do not end with an answer and have no difference."
    if stored["kept"] is None:
        yield "Without a clean reference set (--reference) there is no threshold."


def _screening_table(columns: Sequence[_Summary]) -> Table:
    rows = []
    for column in columns:
        score = column["score"]
        reference = score["reference"] or {}
        mean = score["mean"]
        rows.append(
            (
                column["vector"],
                column["layer"],
                mean["mean"],
                mean["low"],
                mean["high"],
                mean["n"],
                reference.get("mean"),
                score["auc"],
                score["threshold"],
                score["above"] if score["threshold"] is not None else None,
            )
        )
    names = ("vector", "layer", "mean difference", "95 % low", "95 % high", "n")
    more = ("clean set's mean", "AUC to clean set", "threshold", "above it")
    return Table(columns=(*names, *more), rows=tuple(rows))


def _difference_figures(run: RunData, stored: _Summary) -> Iterator[Figure]:
    try:
        values = _differences(run.path / "samples.csv")
        for column in stored["columns"]:
            _ = [rows[f"{column['vector']}_layer{column['layer']}"] for rows in values.values()]
    except (FileNotFoundError, DocumentError, KeyError, ValueError, csv.Error):
        raise StoreError(
            f"{run.path / 'samples.csv'} is missing or damaged: run the command that made "
            f"{run.path} again."
        ) from None
    for column in stored["columns"]:
        name = f"{column['vector']}_layer{column['layer']}"
        groups = [(group, rows[name]) for group, rows in values.items()]
        yield histogram(
            name=f"{run.id}_{name}_differences",
            title=f"Projection differences along {column['vector']}, layer {column['layer']}",
            caption="Each sample's response minus the model's own answer to the same prompt. The "
            f"threshold is percentile {stored['percentile']:g} of the clean set.",
            x=XAxis(
                label="projection difference",
                references=_reference(column["score"]["threshold"]),
            ),
            y_label="samples",
            groups=groups,
        )


def _reference(threshold: float | None) -> list[Reference]:
    return [] if threshold is None else [Reference(x=threshold, label="threshold")]


def _differences(path: Path) -> dict[str, dict[str, list[float]]]:
    """Return set → column → differences, as ``samples.csv`` holds them."""
    table: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
        columns = table.setdefault(row["set"], {})
        for name, cell in row.items():
            if name and name.endswith("_difference"):
                values = columns.setdefault(name.removesuffix("_difference"), [])
                values += [float(cell)] if cell else []
    return table


def _suspicious(stored: _Summary) -> Iterator[Answer]:
    for sample in stored["suspicious"]:
        question = f"line {sample['line']}: {sample['question']}"
        scores = dict(sample["differences"])
        yield Answer(
            condition="training response",
            question=question,
            rollout=0,
            text=sample["response"],
            scores=scores,
        )
        yield Answer(
            condition="model's own answer",
            question=question,
            rollout=0,
            text=sample["natural"],
            scores={},
        )


def _monitoring(run: RunData, stored: _Summary) -> Section:
    columns = stored["columns"]
    suggested = [column for column in columns if column.get("suggested")]
    return Section(
        id=run.id,
        title=f"{run.trait}: prompts monitored on {run.model}",
        summary=" ".join(map(_monitor_summary, suggested or columns[:1])),
        notes=_monitor_notes(columns),
        figures=tuple(_monitor_figures(run, stored)),
        tables=(("Correlation with trait scores", _monitor_table(stored["columns"])),),
        provenance=run.provenance(),
    )


def _monitor_summary(column: _Summary) -> str:
    return (
        f"Before an answer exists, {column['vector']} at layer {column['layer']} predicts its "
        f"{column['metric']} score at r {_correlation(column['overall'])} over all prompts, "
        f"{_correlation(column['within'])} within a condition and "
        f"{_correlation(column['same_question'])} within a question."
    )


def _monitor_notes(columns: Sequence[_Summary]) -> tuple[str, ...]:
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


def _monitor_table(columns: Sequence[_Summary]) -> Table:
    rows = tuple(
        (
            column["vector"],
            column["layer"],
            column["metric"],
            *(_correlation(column[part]) for part in _PARTS),
            column["overall"]["n"],
        )
        for column in columns
    )
    parts = (f"r {name} (95 %)" for name in _PARTS.values())
    return Table(columns=("vector", "layer", "score", *parts, "prompts"), rows=rows)


def _monitor_figures(run: RunData, stored: _Summary) -> Iterator[Figure]:
    for column in stored["columns"]:
        vector, layer = column["vector"], column["layer"]
        yield scatter(
            name=f"{run.id}_{vector}_layer{layer}_prompts",
            title=f"{vector} at the last prompt token, layer {layer}",
            caption="A point per prompt, a colour per condition; r "
            f"{_correlation(column['overall'])} over all, "
            f"{_correlation(column['within'])} within conditions, "
            f"{_correlation(column['same_question'])} within questions.",
            x=XAxis(label="projection of the last prompt token"),
            y_label=f"{column['metric']} score",
            dots=[
                _dot(point["condition"], point["projections"][str(layer)], point["score"])
                for point in stored["points"][vector]
            ],
        )


def _shift(run: RunData, stored: _Summary) -> Section:
    furthest = max(stored["shifts"], key=lambda item: abs(item["shift"]["mean"]))
    return Section(
        id=run.id,
        title=f"Finetuning shift from {stored['base']}",
        summary=(
            f"{model_label(furthest['checkpoint'])} moved furthest: "
            f"{_interval(furthest['shift'])} along {furthest['vector']} at layer "
            f"{furthest['layer']}."
        ),
        notes=tuple(
            f"Shifts along {t['vector']} at layer {t['layer']} go with trait scores at rank "
            f"correlation {_correlation(t['spearman'])} over {t['spearman']['n']} models."
            for t in stored["trends"]
        ),
        figures=tuple(_shift_figures(run, stored)),
        tables=(("Shifts", _shift_table(stored["shifts"])),),
        provenance=run.provenance(),
    )


def _shift_table(shifts: Sequence[_Summary]) -> Table:
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


def _shift_figures(run: RunData, stored: _Summary) -> Iterator[Figure]:
    for trend in stored["trends"]:
        vector, layer = trend["vector"], trend["layer"]
        dots = [
            _dot(model_label(item["checkpoint"]), item["shift"]["mean"], item["score"])
            for item in stored["shifts"]
            if item["vector"] == vector and item["layer"] == layer and item["score"] is not None
        ]
        if trend.get("base_score") is not None:
            dots.insert(0, _dot(f"{model_label(stored['base'])} (base)", 0.0, trend["base_score"]))
        yield scatter(
            name=f"{run.id}_{vector}_layer{layer}_shift",
            title=f"Shift along {vector} at layer {layer} and trait score",
            caption=f"A point per model; r {_correlation(trend['pearson'])}, by rank "
            f"{_correlation(trend['spearman'])}.",
            x=XAxis(label="finetuning shift"),
            y_label="trait score",
            dots=dots,
        )


def _dot(group: str, x: float, y: float) -> Dot:
    return Dot(group=group, x=exact(x), y=exact(y))


def _interval(value: _Summary) -> str:
    text = f"{_number(value['mean'])}"
    if value["low"] is not None:
        text += f" ({_number(value['low'])} to {_number(value['high'])})"
    return text


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _correlation(value: _Summary) -> str:
    if value["r"] is None:
        return "–"
    if value["low"] is None:
        return f"{value['r']:.2f}"
    return f"{value['r']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
