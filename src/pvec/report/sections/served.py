"""What a page shows of the log of ``pvec serve``: where answers lay, over time and by steering."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from pvec.documents import misfit
from pvec.errors import StoreError
from pvec.report.axes import XAxis
from pvec.report.figure import Figure, Table
from pvec.report.figures import Line, Panel, histogram, line_chart
from pvec.report.page import Answer, Chapter, Section
from pvec.report.sections.common import listed
from pvec.report.style import number
from pvec.runs.jsonl import read_jsonl
from pvec.stats import grouped_mean
from pvec.types import LIMITS

_LINE = {
    "id": str, "time": float, "model": str, "finish_reason": str, "capped": [str],
    "steering": [{"vector": str, "layer": int, "coef": float, "operator": str}],
    "projections": {...: {"layer": int, "answer": (float, NoneType)}},
}  # fmt: skip
_POINTS, _PER_POINT = 40, 10
"""Points of a line over time, at most, and answers of a point, at least."""

Records = Sequence[Mapping[str, Any]]


def build(logs: Sequence[Path]) -> Chapter:
    """Return a section for each log. Raises ``StoreError`` for a file that is none."""
    sections = tuple(_section(log) for log in logs)
    return Chapter(summary=" ".join(section.summary for section in sections), sections=sections)


def _section(log: Path) -> Section:
    records = list(_read(log))
    if not records:
        raise StoreError(
            f"{log} holds no answer of pvec serve: give its log once it has answered, or a run "
            f"folder."
        )
    vectors = list(dict.fromkeys(name for record in records for name in record["projections"]))
    model = listed(record["model"] for record in records)
    ends = [datetime.fromtimestamp(record["time"], UTC) for record in (records[0], records[-1])]
    means = [
        f"{name} {number(float(np.mean(_values(records, name))), 3)} on average"
        for name in vectors
        if _values(records, name)
    ]
    capped = sum(bool(record["capped"]) for record in records)
    ended = Counter(record["finish_reason"] for record in records)
    return Section(
        id=re.sub(r"[^\w-]+", "-", log.name).strip("-") or "log",
        title=f"Answers of {model}, as served",
        summary=f"{model} gave {len(records):,} answers ({', '.join(means) or 'no projections'}; "
        f"{capped:,} capped by a policy).",
        notes=(
            "Projections are in mean residual norms of the extraction's answers, as the residual "
            "stream ran: at a layer that is steered the addition is in them.",
        ),
        figures=tuple(_figures(records, vectors)),
        tables=(("By steering", _by_steering(records, vectors)),),
        answers=tuple(_answers(records)),
        source=f"{model} · {log.name} · {ends[1]:%Y-%m-%d}",
        provenance=(
            ("log", str(log)),
            (
                "first and last answer (UTC)",
                " to ".join(f"{end:%Y-%m-%d %H:%M:%S}" for end in ends),
            ),
            ("ended by", ", ".join(f"{reason} {n:,}" for reason, n in ended.items())),
        ),
    )


def _read(log: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a log, those of its older parts (``LOG.2``, ``LOG.1``) first."""
    older = [log.with_name(f"{log.name}.{n}") for n in range(9, 0, -1)]
    for part in (*filter(Path.exists, older), log):
        for place, record in read_jsonl(part):
            if (wrong := misfit(record, _LINE)) is not None:
                raise StoreError(
                    f"{part} is no log of pvec serve (line {place}: {wrong}): give the file of "
                    f"pvec serve --log, or a run folder."
                )
            yield record


def _values(records: Records, vector: str) -> list[float]:
    found = (record["projections"].get(vector, {}).get("answer") for record in records)
    return [value for value in found if value is not None]


def _steering(record: Mapping[str, Any]) -> str:
    """Return ``evil@3 +0.5``, or unsteered; entries of several are joined."""
    entries = []
    for entry in record["steering"]:
        how = "ablated" if entry["operator"] == "ablate" else f"{entry['coef']:+g}"
        limit = f"{entry['operator']} " if entry["operator"] in LIMITS else ""
        entries.append(f"{entry['vector']}@{entry['layer']} {limit}{how}")
    return ", ".join(entries) or "unsteered"


def _by_steering(records: Records, vectors: Sequence[str]) -> Table:
    rows = []
    for steering, count in Counter(map(_steering, records)).most_common():
        own = [record for record in records if _steering(record) == steering]
        for vector in vectors:
            values = _values(own, vector)
            spread = np.percentile(values, [5, 95]).tolist() if values else [None, None]
            mean = float(np.mean(values)) if values else None
            capped = sum(vector in record["capped"] for record in own)
            rows.append((steering, count, vector, mean, *spread, capped))
    ends = ("5th percentile", "95th percentile")
    columns = ("steering", "answers", "vector", "mean", *ends, "capped")
    return Table(columns=columns, rows=tuple(rows))


def _figures(records: Records, vectors: Sequence[str]) -> Iterator[Figure]:
    start = records[0]["time"]
    minutes = np.array([(record["time"] - start) / 60 for record in records])
    bins = np.array_split(
        np.argsort(minutes, kind="stable"), min(_POINTS, max(len(records) // _PER_POINT, 1))
    )
    panels = []
    for vector in vectors:
        points = []
        for members in bins:
            own = [records[place] for place in members]
            values = [record["projections"].get(vector, {}).get("answer") for record in own]
            points.append(grouped_mean(values, groups=[record["id"] for record in own]))
        places = [float(np.mean(minutes[members])) for members in bins]
        line = Line(label=vector, x=places, points=points)
        panels.append(Panel(label="projection", lines=[line]))
    if panels and len(bins) > 1:
        yield line_chart(
            name="projections-over-time",
            title="Projections of answers over time",
            caption="Each point is the mean of answers that followed each other.",
            x=XAxis(label="minutes since the first answer"),
            panels=panels,
        )
    for vector in vectors:
        groups: dict[str, list[float]] = {}
        for record in records:
            groups.setdefault(_steering(record), []).extend(_values([record], vector))
        shown = sorted(groups.items(), key=lambda group: -len(group[1]))[:5]
        if any(values for _, values in shown):
            yield histogram(
                name=f"projections-{vector}",
                title=f"Projections of answers on {vector}",
                caption="By steering; the table below has every steering."
                if len(groups) > len(shown)
                else "By steering.",
                x=XAxis(label=f"projection on {vector}, in mean residual norms"),
                groups=shown,
                y_label="answers",
            )


def _answers(records: Records) -> Iterator[Answer]:
    """Yield the texts, where the server wrote them (``--log-text``)."""
    asked: Counter[tuple[str, str]] = Counter()
    for record in records:
        if "answer" not in record or "prompt" not in record:
            continue
        condition, prompt = _steering(record), str(record["prompt"])
        asked[condition, prompt] += 1
        yield Answer(
            condition=condition,
            question=prompt,
            rollout=asked[condition, prompt],
            text=str(record["answer"]),
            scores={},
        )
