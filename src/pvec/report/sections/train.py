"""Finetunings: how far the persona moved and the loss beside it, and what was steered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvec.documents import misfit, read_json
from pvec.errors import StoreError
from pvec.report.axes import XAxis, exact
from pvec.report.dots import bars
from pvec.report.figure import Cell, Figure, Table, interval_text
from pvec.report.figures import Level, Line, Panel, line_chart
from pvec.report.page import Answer, Section
from pvec.report.sections.common import RunData, listed
from pvec.report.style import number
from pvec.runs.jsonl import read_jsonl
from pvec.runs.summary import ANSWERS, HIGH, HOOKS_ON, LOW, PREFIX, read_log
from pvec.stats import Interval

BEFORE, AFTER = "before training", "after training"

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


class Finetuning:
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
        """Return what a page shows of it."""
        return Section(
            title=f"Finetuning {self.data.model}: {self.data.path.resolve().name}",
            summary=self._summary(),
            notes=tuple(self._notes()),
            figures=tuple(self._figures()),
            tables=tuple(self._tables()),
            answers=tuple(self._answers()),
            compare=(BEFORE, AFTER),
        )

    def _line(self, label: str, key: str) -> Line:
        logged = [line for line in self.log if key in line]
        return Line(
            label=label,
            x=[float(line["step"]) for line in logged],
            points=[self._point(line, key) for line in logged],
        )

    def _point(self, line: Mapping[str, Any], key: str) -> Interval:
        """Return a logged number, with its interval over the probe prompts where it has one."""
        value, name = exact(float(line[key])), key.removeprefix(PREFIX)
        if f"{LOW}{name}" not in line:
            return value
        low, high = (float(line[f"{end}{name}"]) for end in (LOW, HIGH))
        return Interval(mean=value.mean, low=low, high=high, n=self.prompts, groups=self.prompts)

    @property
    def prompts(self) -> int:
        """How many probe prompts the shift rests on; 1 where the log does not say."""
        counts = [
            len(value)
            for line in self.log
            for key, value in line.items()
            if key.startswith("persona_base_prompts/")
        ]
        return counts[0] if counts else 1

    def moved(self) -> list[tuple[str, Interval]]:
        """Return the last shift along each vector: the numbers that the command printed."""
        return [(line.label, line.points[-1]) for line in self.shifts if line.x]

    def _summary(self) -> str:
        if not self.loss.x:
            return "No step was taken yet."
        first = self.result.get("first_loss", self.loss.points[0].mean)
        last = self.result.get("last_loss", self.loss.points[-1].mean)
        steps = self.result.get("steps", round(self.loss.x[-1]))
        loss = f"the loss went from {first:.3f} to {last:.3f}"
        shifts = [
            item for item in self.moved() if not item[0].endswith("_response")
        ] or self.moved()
        moved = [f"{interval_text(value, sign=True)} along {name}" for name, value in shifts]
        if not moved:
            return f"In {steps} steps {loss}."
        return f"In {steps} steps the model moved {', '.join(moved)}; {loss}."

    def _notes(self) -> Iterator[str]:
        if not self.result:
            yield "This training is not finished: the same command continues it."
        if self.result.get("stopped_early"):
            yield "The alarm on the persona shift stopped this training."
        if not self.shifts:
            yield "Nothing was monitored: name vectors under monitor to see the persona shift."
        else:
            on = sum(line.get(HOOKS_ON, 0.0) > 0 for line in self.log)
            yield f"Measurements of the persona made with steering on: {on}."
            if not (self.data.path / ANSWERS).is_file():
                yield "With monitor.generate the page has answers before and after training."

    def _figures(self) -> Iterator[Figure]:
        if self.shifts:
            alarm = (self.data.settings.get("monitor") or {}).get("alarm")
            yield self._figure(
                "shift",
                title="Persona shift by step",
                caption="Mean activation of the last prompt token over the probe prompts, now "
                "minus before training, projected on each vector (_response: of the tokens of "
                "greedy answers).",
                lines=self.shifts,
                levels=[Level(value=exact(alarm["shift"]), label="alarm")] if alarm else [],
            )
        losses = [line for line in (self.loss, self.held_out) if line.x]
        if losses:
            yield self._figure(
                "loss",
                title="Loss",
                caption="Mean per learnt token; the held-out loss is measured without steering.",
                lines=losses,
            )

    def _figure(
        self,
        label: str,
        *,
        title: str,
        caption: str,
        lines: Sequence[Line],
        levels: Sequence[Level] = (),
    ) -> Figure:
        rows = tuple(
            (line.label, x, point.mean, point.low, point.high)
            for line in lines
            for x, point in zip(line.x, line.points, strict=True)
        )
        zero = Level(value=exact(0.0))
        return line_chart(
            name=f"{self.data.id}_{label}",
            title=title,
            caption=caption,
            x=XAxis(label="step"),
            panels=[Panel(label=label, lines=lines, levels=[*levels, zero])],
            table=Table(columns=("line", "step", label, "low_95", "high_95"), rows=rows),
        )

    def _answers(self) -> Iterator[Answer]:
        """Yield the answers before and after training, side by side."""
        for _, row in read_jsonl(self.data.path / ANSWERS):
            for condition, key in ((BEFORE, "base"), (AFTER, "final")):
                yield Answer(
                    condition=condition,
                    question=str(row["question"]),
                    rollout=0,
                    text=str(row[key]),
                    scores={},
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
            columns = tuple(name.replace("_", " ") for name in shown)
            yield "Result", Table(columns=columns, rows=(values,))


read, section = Finetuning, Finetuning.section


def overview(runs: Sequence[Finetuning]) -> Section:
    """Return the section that compares several finetunings: how far each moved."""
    names = [run.data.path.resolve().name for run in runs]
    moved = [dict(run.moved()) for run in runs]
    vectors = list(dict.fromkeys(name for shifts in moved for name in shifts))
    rows = tuple(
        (
            name,
            *(shifts.get(vector) for vector in vectors),
            run.result.get("last_loss"),
            ", ".join(run.data.run.manifest.get("steering") or []) or None,
        )
        for name, shifts, run in zip(names, moved, runs, strict=True)
    )
    furthest = max(
        ((shift.mean, name, vector) for name, shifts in zip(names, moved, strict=True)
         for vector, shift in shifts.items()),
        default=None,
    )  # fmt: skip
    summary = f"{len(runs)} finetunings."
    if furthest is not None:
        shift, name, vector = furthest
        summary = f"Of {len(runs)} finetunings {name} moved furthest along {vector}: " + (
            f"{number(shift, sign=True)}."
        )
    figure = bars(
        name="finetunings_shift",
        title="Persona shift of each finetuning",
        caption="At the last measurement, in units of the projection.",
        label="persona shift",
        groups=names,
        series={vector: [shifts.get(vector) for shifts in moved] for vector in vectors},
    )
    return Section(
        id="finetunings",
        title=f"Finetunings of {listed(run.data.model for run in runs)}, run by run",
        summary=summary,
        figures=(figure,) if vectors else (),
        tables=(("At the end", Table(columns=("run", *vectors, "loss", "steering"), rows=rows)),),
        source=", ".join(dict.fromkeys(run.data.source for run in runs)),
    )
