"""Training data screened by its projection differences (``pvec screen``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from pvec.documents import DocumentError, misfit, read_text
from pvec.errors import StoreError
from pvec.report.axes import Reference, XAxis
from pvec.report.figure import Cell, Figure, Table, interval_text
from pvec.report.figures import histogram
from pvec.report.page import Answer, Section, Widget, encode_floats
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
from pvec.runs.jsonl import read_jsonl
from pvec.runs.summary import BROWSED, read_summary

_SHAPE = {
    "data": str,
    "natural": str,
    "percentile": float,
    "kept": (str, NoneType),
    **dict.fromkeys(("rows", "unanswered", "removed_rows"), int),
    "columns": [{
        **PLACE,
        "score": {"mean": MEAN, "auc": NUMBER, "threshold": NUMBER, "above": int,
                  "reference": (MEAN, NoneType)},
        "agreement": (R, NoneType),
    }],
    "suspicious": [
        {"line": int, "question": str, "response": str, "natural": str,
         "differences": {...: NUMBER}}
    ],
}  # fmt: skip
"""What this page reads of a summary."""


_SAMPLE = {"number": int, "question": str, "response": str, "natural": (str, NoneType),
           "line": int}  # fmt: skip

_SETS = {"reference": "clean set", "data": "this data set"}
"""Sets of ``samples.csv``, in the order and with the names of the page."""

_PERCENTILES = (80.0, 90.0, 95.0, 97.5, 99.0, 99.5)


def section(run: RunData) -> Section:
    """Return what a page shows of a screened file."""
    stored = read_summary(run.path, shape=_SHAPE)
    data = Path(stored["data"]).name
    columns = stored["columns"]
    sets = _read_differences(run.path / "samples.csv", stored)
    samples = _read_samples(run.path / BROWSED)
    return Section(
        title=f"{data}: screened on {run.model}",
        summary=_screening_summary(stored, data),
        notes=tuple(_screening_notes(stored)),
        figures=tuple(_difference_figures(run, stored, sets)),
        widgets=(_widget(run, stored, sets, samples),),
        tables=(("Data set by vector", _screening_table(columns)),),
        answers=() if samples else tuple(_suspicious(stored)),
        compare=("model's own answer", "training response"),
    )


def _screening_summary(stored: Summary, data: str) -> str:
    furthest = max(stored["columns"], key=lambda c: c["score"]["mean"]["mean"] or float("-inf"))
    text = (
        f"{data} points furthest along {furthest['vector']} at layer {furthest['layer']}: "
        f"{interval_text(interval_of(furthest['score']['mean']))} beyond the model's own answers."
    )
    if stored["kept"] is not None:
        text += f" {stored['removed_rows']:,} of {stored['rows']:,} samples were removed."
    return text


def _screening_notes(stored: Summary) -> Iterator[str]:
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
                f"with generated ones at r {correlation_text(column['agreement'])}."
            )
    if stored["unanswered"]:
        yield f"{stored['unanswered']} samples do not end with an answer and have no difference."
    if stored["kept"] is None:
        yield "Without a clean reference set (--reference) there is no threshold."


def _screening_table(columns: Sequence[Summary]) -> Table:
    rows = []
    for column in columns:
        score = column["score"]
        reference = score["reference"]
        rows.append(
            (
                column["vector"],
                column["layer"],
                interval_of(score["mean"]),
                score["mean"]["n"],
                interval_of(reference) if reference else None,
                score["auc"],
                score["threshold"],
                score["above"] if score["threshold"] is not None else None,
            )
        )
    names = ("vector", "layer", "mean difference (95 %)", "n", "clean set's (95 %)")
    more = ("AUC to clean set", "threshold", "above it")
    return Table(columns=(*names, *more), rows=tuple(rows))


def _difference_figures(
    run: RunData, stored: Summary, sets: Mapping[str, np.ndarray]
) -> Iterator[Figure]:
    for c, column in enumerate(stored["columns"]):
        figure = histogram(
            name=f"{run.id}_{column['vector']}_layer{column['layer']}_differences",
            title=f"Projection differences along {_name(column)}",
            caption="Each sample's response minus the model's own answer to the same prompt. The "
            f"threshold is percentile {stored['percentile']:g} of the clean set.",
            x=_axis(run, column),
            y_label="samples",
            groups=[
                (_SETS[name], _known(sets[name][:, c]).tolist()) for name in _SETS if name in sets
            ],
        )
        # of the file: the data set first
        columns = ("from", "to", *(name for name in reversed(_SETS) if name in sets))
        rows = tuple((*row[:2], *row[:1:-1]) for row in figure.table.rows)
        yield replace(figure, table=Table(columns=columns, rows=rows))


def _axis(run: RunData, column: Summary) -> XAxis:
    """Return the axis of differences, with the threshold where there is one."""
    vector, layer = column["vector"], column["layer"]
    axis = run.projection_axis("projection difference", vector, layer, of=None)
    threshold = column["score"]["threshold"]
    known = [] if threshold is None else [Reference(x=threshold, label="threshold")]
    return replace(axis, references=known)


def _read_differences(path: Path, stored: Summary) -> dict[str, np.ndarray]:
    """Return set → differences ``[samples, columns]`` of ``samples.csv``, NaN where unknown."""
    names = [f"{c['vector']}_layer{c['layer']}_difference" for c in stored["columns"]]
    rows: dict[str, list[list[float]]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            cells = [float(row[name] or "nan") for name in names]
            if row["set"] not in _SETS:
                raise ValueError(row["set"])
            rows.setdefault(row["set"], []).append(cells)
        return {"data": np.empty((0, len(names)))} | {k: np.array(v) for k, v in rows.items()}
    except (FileNotFoundError, DocumentError, KeyError, TypeError, ValueError, csv.Error):
        raise StoreError(
            f"{path} is missing or damaged: run the command that made {path.parent} again."
        ) from None


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples with their texts; none from a run of an earlier version."""
    samples = []
    for number, sample in read_jsonl(path):
        if misfit(sample, _SAMPLE) is not None:
            raise StoreError(f"{path}:{number} is damaged: screen the file again.")
        samples.append(dict(sample))
    return samples


def _widget(
    run: RunData,
    stored: Summary,
    sets: Mapping[str, np.ndarray],
    samples: Sequence[Mapping[str, Any]],
) -> Widget:
    clean = sets.get("reference", np.empty((0, len(stored["columns"]))))
    notes = ["Move the line, by pointer or arrow keys, to see what another threshold would remove."]
    if stored["kept"] is not None:
        notes.append(
            f"The files were split at percentile {stored['percentile']:g} of the clean set; for "
            "another threshold run the command again with another percentile."
        )
    return Widget(
        id=f"{run.id}-screening",
        kind="screening",
        title="Differences and the threshold",
        notes=tuple(notes),
        data={
            "columns": [
                {"name": _name(column), "threshold": column["score"]["threshold"]}
                for column in stored["columns"]
            ],
            "values": encode_floats(sets["data"]),
            "reference": encode_floats(clean),
            "samples": list(samples),
        },
        table=("What a threshold costs", _cost_table(stored, sets)),
        noscript="The figures below show the differences; all are in samples.csv.",
    )


def _cost_table(stored: Summary, sets: Mapping[str, np.ndarray]) -> Table:
    """Return what thresholds cost: at percentiles of the clean set, else of the data itself."""
    basis = "clean set" if "reference" in sets else "data"
    percentiles = sorted({*_PERCENTILES, float(stored["percentile"])})
    rows: list[tuple[Cell, ...]] = []
    for c, column in enumerate(stored["columns"]):
        data = _known(sets["data"][:, c])
        clean = _known(sets["reference"][:, c]) if "reference" in sets else None
        of = data if clean is None else clean
        if not len(data) or not len(of):
            continue
        for percentile in percentiles:
            limit = float(np.percentile(of, percentile))
            gone = data > limit
            rest = data[~gone]
            rows.append(
                (
                    column["vector"],
                    column["layer"],
                    percentile,
                    limit,
                    int(gone.sum()),
                    100 * float(gone.mean()),
                    None if clean is None else 100 * float((clean > limit).mean()),
                    float(rest.mean()) if len(rest) else None,
                )
            )
    return Table(
        columns=(
            "vector", "layer", f"percentile of the {basis}", "threshold", "removed", "removed (%)",
            "clean set removed (%)", "mean difference of the rest",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _known(values: np.ndarray) -> np.ndarray:
    known: np.ndarray = values[np.isfinite(values)]
    return known


def _name(column: Summary) -> str:
    return f"{column['vector']}, layer {column['layer']}"


def _suspicious(stored: Summary) -> Iterator[Answer]:
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
