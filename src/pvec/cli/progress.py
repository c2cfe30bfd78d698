"""How the progress of a command is shown: bars that fit a terminal of 80 columns, or plain lines.

The time left is reckoned from when the first part of a stage was done, because loading, the first
batch and a judge's first replies say nothing about the speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pvec.types import Progress

if TYPE_CHECKING:
    import rich.console
    from rich.progress import TaskID

OnProgress = Callable[[Progress], None]
Clock = Callable[[], float]

PLAIN_SECONDS = 10.0
"""Least time between two progress lines of a stage when the output is no terminal …"""
PLAIN_SHARE = 0.1
"""… unless this share of the work was done since the last one."""

_BAR = 12
"""Columns that a bar keeps when the words beside it are many, with the space around it."""

_SURE_SECONDS = 1.0
"""Time over which a speed must have been seen before it is shown."""


@dataclass(kw_only=True)
class Pace:
    """How fast a stage goes: ``began`` is its start, ``first`` when its first part was done."""

    began: tuple[float, int]
    first: tuple[float, int] | None = None
    written: tuple[float, int] = field(default=(0.0, 0))

    def rate(self, now: float, done: int) -> float | None:
        """Return parts per second, or None while it is too early to tell."""
        if done > self.began[1] and self.first is None:
            self.first = (now, done)
        if self.first is None or now - self.first[0] < _SURE_SECONDS:
            return None
        return (done - self.first[1]) / (now - self.first[0]) or None


def describe(progress: Progress, pace: Pace, now: float, *, room: int = 200) -> str:
    """Return count, speed and time left in words; of a finished stage only what was done.

    The stage's own detail follows where there is ``room``, in characters.
    ``1,200/2,000 answers, 12.3 answers/s, 1m 05s left, 410 tokens/s``.
    """
    if progress.total == 0:
        return f"no {progress.unit} left to do"
    total = "" if progress.total is None else f"/{progress.total:,}"
    text = f"{progress.done:,}{total} {progress.unit}"
    finished = progress.total is not None and progress.done >= progress.total
    began, before = pace.began
    rate = pace.rate(now, progress.done)
    if finished and progress.done > before and now > began:
        rate = (progress.done - before) / (now - began)
    if rate is not None:
        text += f", {rate:.3g} {progress.unit}/s"
        if progress.total is not None and not finished:
            text += f", {duration((progress.total - progress.done) / rate)} left"
    whole = f"{text}, {progress.detail}"
    return text if finished or not progress.detail or len(whole) > room else whole


class PlainProgress:
    """Progress as lines, few enough for a log file: on a stage's start, end, and in between."""

    def __init__(self, write: Callable[[str], None], *, clock: Clock = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._stage: str | None = None
        self._pace = Pace(began=(0.0, 0))
        self._outer: Pace | None = None

    def __call__(self, progress: Progress) -> None:
        """Write a line when enough happened since the last one."""
        now = self._clock()
        if progress.outer:
            self._outer, self._stage = self._outer or _pace(progress, now), None
            self._write(f"{progress.stage}: {describe(progress, self._outer, now)}")
            return
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._pace = _pace(progress, now)
        else:
            self._pace.rate(now, progress.done)
            if not self._due(progress, now):
                return
        self._pace.written = (now, progress.done)
        self._write(f"{progress.stage}: {describe(progress, self._pace, now)}")

    def _due(self, progress: Progress, now: float) -> bool:
        written_at, written = self._pace.written
        if progress.total and progress.done >= progress.total:
            return written < progress.done
        share = (progress.done - written) / progress.total if progress.total else 0.0
        waited = now - written_at
        return waited >= PLAIN_SECONDS or (share >= PLAIN_SHARE and waited >= 1.0)


@contextmanager
def bars(console: rich.console.Console, *, clock: Clock = time.monotonic) -> Iterator[OnProgress]:
    """Draw one bar per stage; the bar gives way to the words beside it."""
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    drawn = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4, max_width=30)),
        TextColumn(
            "{task.fields[said]}", markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        expand=True,
    )  # fmt: skip
    tasks: dict[str, tuple[TaskID, Pace]] = {}

    def on_progress(progress: Progress) -> None:
        now = clock()
        if progress.outer:  # the stages of its last part give way to those of the next
            for stage in [stage for stage in tasks if stage != progress.stage]:
                drawn.remove_task(tasks.pop(stage)[0])
        if progress.stage not in tasks:
            tasks[progress.stage] = (
                drawn.add_task(progress.stage, total=progress.total, said=""),
                _pace(progress, now),
            )
        task, pace = tasks[progress.stage]
        room = console.width - len(progress.stage) - _BAR
        said = describe(progress, pace, now, room=room)
        drawn.update(task, total=progress.total, completed=progress.done, said=said)

    with drawn:
        yield on_progress


def _pace(progress: Progress, now: float) -> Pace:
    """Return the pace of a stage that begins; of outer parts the first one's time counts too."""
    began = (now, progress.done)
    return Pace(began=began, first=began if progress.outer else None)


def duration(seconds: float) -> str:
    """Return a duration in words: ``8s``, ``2m 05s``, ``3h 20m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
