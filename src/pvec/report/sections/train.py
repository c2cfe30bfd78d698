"""Finetunings: the loss, how far the persona moved meanwhile, and what was steered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvec.documents import misfit, read_json
from pvec.errors import StoreError
from pvec.report.axes import XAxis, exact
from pvec.report.figure import Cell, Figure, Table
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.page import Chapter, Section
from pvec.report.sections.common import RunData
from pvec.runs.summary import HOOKS_ON, PREFIX, read_log


def build(runs: Sequence[RunData]) -> Chapter:
    """Return one section per finetuning."""
    sections = tuple(_Finetuning(run).section() for run in runs)
    summary = sections[0].summary if len(sections) == 1 else f"{len(sections)} finetunings."
    return Chapter(summary=summary, sections=sections)


_RESULT = {"steps": int, "first_loss": float, "last_loss": float, "stopped_early": bool}
"""What this page reads of a training's result."""


def _read_result(path: Path) -> Mapping[str, Any]:
    result: Mapping[str, Any] = read_json(path, finite=False)
    wrong = misfit(result, _RESULT)
    if wrong is not None:
        raise StoreError(
            f"{path} is damaged (at {wrong}): delete it and run the same `pvec train` again."
        )
    return result


class _Finetuning:
    """One run, read once. ``result`` is empty while the training is not finished."""

    def __init__(self, data: RunData) -> None:
        self.data = data
        self.log = read_log(data.path)
        path = data.path / "result.json"
        self.result: Mapping[str, Any] = {}
        if path.is_file():
            self.result = _read_result(path)
        self.loss = self._line("training loss", "loss")
        self.held_out = self._line("held-out loss", "eval_loss")
        keys = dict.fromkeys(key for line in self.log for key in line if key.startswith(PREFIX))
        self.shifts = [self._line(key.removeprefix(PREFIX), key) for key in keys if key != HOOKS_ON]

    def section(self) -> Section:
        return Section(
            id=self.data.id,
            title=f"{self.data.model}: finetuning {self.data.path.resolve().name}",
            summary=self._summary(),
            notes=tuple(self._notes()),
            figures=tuple(self._figures()),
            tables=tuple(self._tables()),
            provenance=self.data.provenance(),
        )

    def _line(self, label: str, key: str) -> Line:
        logged = [line for line in self.log if key in line]
        return Line(
            label=label,
            x=[float(line["step"]) for line in logged],
            points=[exact(float(line[key])) for line in logged],
        )

    def _summary(self) -> str:
        if not self.loss.x:
            return "No step was taken yet."
        first = self.result.get("first_loss", self.loss.points[0].mean)
        last = self.result.get("last_loss", self.loss.points[-1].mean)
        steps = self.result.get("steps", round(self.loss.x[-1]))
        text = f"In {steps} steps the loss went from {first:.3f} to {last:.3f}"
        moved = [f"{s.points[-1].mean:+.3g} along {s.label}" for s in self.shifts if s.x]
        return f"{text}; the model moved {', '.join(moved)}." if moved else f"{text}."

    def _notes(self) -> Iterator[str]:
        if not self.result:
            yield "This training is not finished: the same command continues it."
        if self.result.get("stopped_early"):
            yield "The alarm on the persona shift stopped this training."
        on = sum(line.get(HOOKS_ON, 0.0) > 0 for line in self.log)
        if self.shifts:
            yield f"Measurements of the persona made with steering on: {on}."

    def _figures(self) -> Iterator[Figure]:
        losses = [line for line in (self.loss, self.held_out) if line.x]
        if losses:
            yield self._figure(
                "loss",
                title="Loss",
                caption="Mean per learnt token; the held-out loss is measured without steering.",
                lines=losses,
            )
        if self.shifts:
            yield self._figure(
                "shift",
                title="Persona shift",
                caption="Mean activation of the last prompt token over the probe prompts, now "
                "minus before training, projected on each vector.",
                lines=self.shifts,
            )

    def _figure(self, label: str, *, title: str, caption: str, lines: Sequence[Line]) -> Figure:
        rows = tuple(
            (line.label, x, point.mean)
            for line in lines
            for x, point in zip(line.x, line.points, strict=True)
        )
        return line_chart(
            name=f"{self.data.id}_{label}",
            title=title,
            caption=caption,
            x=XAxis(label="step"),
            panels=[Panel(label=label, lines=lines, levels=[Level(value=exact(0.0))])],
            table=Table(columns=("line", "step", label), rows=rows),
        )

    def _tables(self) -> Iterator[tuple[str, Table]]:
        steering = self.data.run.manifest.get("steering") or []
        touched = self.result.get("touched") or [None] * len(steering)
        if steering:
            rows: list[tuple[Cell, ...]] = list(zip(steering, touched, strict=True))
            yield "Steering", Table(columns=("what", "positions touched"), rows=tuple(rows))
        if self.result:
            shown = ("steps", "first_loss", "last_loss", "held_out_loss", "tokens_per_second")
            values = tuple(self.result[name] for name in shown)
            yield "Result", Table(columns=shown, rows=(values,))
