"""Finetunings: the loss, how far the persona moved meanwhile, and what was steered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pvec.report.figures import GRID, MARKERS, SERIES, Cell, Figure, Table
from pvec.report.page import Chapter, Section
from pvec.report.sections.common import RunData
from pvec.runs.summary import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

PREFIX = "persona/"
HOOKS_ON = "persona/hooks_on"


def build(runs: Sequence[RunData]) -> Chapter:
    """Return one section per finetuning."""
    sections = tuple(_Finetuning(run).section() for run in runs)
    finding = sections[0].finding if len(sections) == 1 else f"{len(sections)} finetunings."
    return Chapter(finding=finding, sections=sections)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One curve: a name and its points."""

    name: str
    points: tuple[tuple[float, float], ...]


class _Finetuning:
    """One run, read once."""

    def __init__(self, data: RunData) -> None:
        self.data = data
        self.log = read_log(data.path)
        path = data.path / "result.json"
        self.result: Mapping[str, Any] = {}
        if path.is_file():
            self.result = json.loads(path.read_text(encoding="utf-8"))
        self.loss = self._line("training loss", "loss")
        self.held_out = self._line("held-out loss", "eval_loss")
        keys = [key for line in self.log for key in line if key.startswith(PREFIX)]
        self.shifts = [
            self._line(key.removeprefix(PREFIX), key)
            for key in dict.fromkeys(keys)
            if key != HOOKS_ON
        ]

    def section(self) -> Section:
        return Section(
            id=self.data.id,
            title=f"{self.data.model}: finetuning {self.data.path.resolve().name}",
            finding=self._finding(),
            notes=tuple(self._notes()),
            figures=tuple(self._figures()),
            tables=tuple(self._tables()),
            provenance=self.data.provenance(),
        )

    def _line(self, name: str, key: str) -> _Line:
        points = ((float(one["step"]), float(one[key])) for one in self.log if key in one)
        return _Line(name=name, points=tuple(points))

    def _finding(self) -> str:
        if not self.loss.points:
            return "No step was taken yet."
        steps = round(self.loss.points[-1][0])
        text = (
            f"In {steps} steps the loss went from {self.loss.points[0][1]:.3f} to "
            f"{self.loss.points[-1][1]:.3f}"
        )
        moved = [f"{s.points[-1][1]:+.3g} along {s.name}" for s in self.shifts if s.points]
        return f"{text}; the model moved {', '.join(moved)}." if moved else f"{text}."

    def _notes(self) -> Iterator[str]:
        if not self.result:
            yield "This training is not finished: the same command goes on with it."
        if self.result.get("stopped_early"):
            yield "The alarm on the persona shift stopped this training."
        on = sum(line.get(HOOKS_ON, 0.0) > 0 for line in self.log)
        if self.shifts:
            yield f"Measurements of the persona made with steering on: {on}."

    def _figures(self) -> Iterator[Figure]:
        losses = [line for line in (self.loss, self.held_out) if line.points]
        if losses:
            yield _figure(
                name=f"{self.data.id}_loss",
                title="Loss",
                caption="Mean per learnt token; the held-out loss is measured without steering.",
                label="loss",
                lines=losses,
            )
        if self.shifts:
            yield _figure(
                name=f"{self.data.id}_shift",
                title="Persona shift",
                caption="Mean activation of the last prompt token over the probe prompts, now "
                "minus before training, projected on each vector.",
                label="shift",
                lines=self.shifts,
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


def _figure(*, name: str, title: str, caption: str, label: str, lines: Sequence[_Line]) -> Figure:
    def draw(canvas: Canvas) -> None:
        axis: Axes = canvas.subplots()
        for number, line in enumerate(lines):
            axis.plot(
                [x for x, _ in line.points],
                [y for _, y in line.points],
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)] if len(line.points) <= 40 else "",
                label=line.name,
            )
        axis.axhline(0, color=GRID, linewidth=1.4, zorder=0.5)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        canvas.legend(loc="outside lower center", ncols=2)

    rows = tuple((line.name, x, y) for line in lines for x, y in line.points)
    return Figure(
        name=name,
        title=title,
        caption=caption,
        table=Table(columns=("line", "step", label), rows=rows),
        draw=draw,
    )
