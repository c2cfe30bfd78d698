"""Output of a command: results on stdout, progress and notes on stderr, JSON with ``--json``.

The only module, with the commands' own rendering, that writes to the terminal. Workflows know
nothing of it: they take ``on_progress`` and return results.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pvec.types import Progress

if TYPE_CHECKING:
    import rich.console
    from rich.progress import TaskID
    from rich.table import Table

OnProgress = Callable[[Progress], None]
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Feature(Protocol[Result_co]):
    """A command's work with its arguments bound (``functools.partial``)."""

    def __call__(self, *, notify: Callable[[str], None], on_progress: OnProgress) -> Result_co:
        """Do the work."""


PLAIN_SECONDS = 10.0
"""Least time between two progress lines of a stage when the output is no terminal …"""
PLAIN_SHARE = 0.1
"""… unless this share of the work was done since the last one."""
SILENT_SECONDS = 0.2
"""How long a terminal stays empty before it is told that libraries are loading."""


class Console:
    """Writes for one command. With ``json`` stdout holds nothing but the result."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self.out = _terminal(stderr=False)
        self.err = _terminal(stderr=True)

    def print(self, *renderables: Any) -> None:
        """Show a result to people: text, tables. Nothing with ``--json`` (see ``emit``)."""
        if not self.json:
            text = all(isinstance(item, str) for item in renderables)
            self.out.print(*renderables, soft_wrap=text)  # a path or command stays in one piece

    def note(self, text: str) -> None:
        """Show on stderr what was chosen or happened; nothing with ``--quiet``."""
        if not self.quiet:
            self.err.print(text, style="dim", markup=False)

    def detail(self, text: str) -> None:
        """Show on stderr what only ``--verbose`` asks for."""
        if self.verbose and not self.quiet:
            self.err.print(text, style="dim", markup=False)

    def warn(self, text: str) -> None:
        """Show on stderr what the user must not miss, even with ``--quiet``."""
        self.err.print(f"Warning: {text}", style="yellow", markup=False)

    @contextmanager
    def note_if_slow(self) -> Iterator[None]:
        """Say on a terminal that pvec is starting, unless something else is shown soon."""
        if self.quiet or not self.err.is_terminal:
            yield
            return

        def note() -> None:
            if not (self.out.used or self.err.used):
                self.note("starting: loading libraries …")

        timer = threading.Timer(SILENT_SECONDS, note)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def call(self, feature: Feature[Result]) -> Result:
        """Return the result of a feature that shows its notes and its progress here."""
        with self.progress() as on_progress:
            return feature(notify=self.note, on_progress=on_progress)

    def emit(self, result: Result, render: Callable[[Console, Result], None]) -> None:
        """Show a command's result: as JSON with ``--json``, else as ``render`` draws it."""
        if self.json:
            emit_json(result)
        else:
            render(self, result)

    @contextmanager
    def progress(self) -> Iterator[OnProgress]:
        """Give a function to hand to a workflow as ``on_progress``.

        Draws one bar per stage with rate and time left on a terminal, plain lines elsewhere,
        nothing with ``--quiet``.
        """
        if self.quiet:
            yield lambda _: None
        elif self.err.is_terminal:
            with _bars(self.err) as on_progress:
                yield on_progress
        else:
            yield PlainProgress(lambda line: self.err.print(line, markup=False, soft_wrap=True))


_VISIBLE = (
    {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
    | {0x7F: "\u2421"}
    | dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")
    | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")
)
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0xD800, 0xE000))}


def visible(text: str) -> str:
    """Return ``text`` with every character that could command a terminal replaced by a symbol.

    Answers, file names, columns and replies of servers may hold escape sequences. Line feeds and
    tabs stay; so does everything that is only unusual.
    """
    return text.translate(_VISIBLE)


def _terminal(*, stderr: bool) -> Any:
    """Return a console where text is text: no markup, no control characters but rich's own.

    Its ``used`` says whether anything was printed.
    """
    from rich.console import Console as RichConsole
    from rich.segment import Segment

    class Terminal(RichConsole):
        used = False

        def print(self, *objects: Any, **options: Any) -> None:
            self.used = True
            super().print(*objects, **options)

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else visible(text), style, control)

    return Terminal(highlight=False, markup=False, emoji=False, stderr=stderr)


class PlainProgress:
    """Progress as lines, few enough for a log file: on a stage's start, end, and in between."""

    def __init__(
        self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._stage: str | None = None
        self._started = (0.0, 0)
        self._last = (0.0, 0)

    def __call__(self, progress: Progress) -> None:
        """Write a line when enough happened since the last one."""
        now = self._clock()
        if progress.stage != self._stage:
            self._stage = progress.stage
            self._started = self._last = (now, progress.done)
            self._write(self._line(progress, now))
        elif self._due(progress, now):
            self._last = (now, progress.done)
            self._write(self._line(progress, now))

    def _due(self, progress: Progress, now: float) -> bool:
        written_at, written = self._last
        if progress.total and progress.done >= progress.total:
            return written < progress.done
        share = (progress.done - written) / progress.total if progress.total else 0.0
        waited = now - written_at
        return waited >= PLAIN_SECONDS or (share >= PLAIN_SHARE and waited >= 1.0)

    def _line(self, progress: Progress, now: float) -> str:
        total = "" if progress.total is None else f"/{progress.total:,}"
        text = f"{progress.stage}: {progress.done:,}{total} {progress.unit}"
        started_at, started = self._started
        rate = (progress.done - started) / (now - started_at) if now > started_at else 0.0
        if rate > 0:
            text += f", {rate:.3g} {progress.unit}/s"
            if progress.total is not None and progress.done < progress.total:
                text += f", {duration((progress.total - progress.done) / rate)} left"
        return f"{text}, {progress.detail}" if progress.detail else text


@contextmanager
def _bars(console: rich.console.Console) -> Iterator[OnProgress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", style="dim", markup=False),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def on_progress(progress: Progress) -> None:
        if progress.stage not in tasks:
            tasks[progress.stage] = bars.add_task(
                progress.stage, total=progress.total, completed=progress.done, rate="", detail=""
            )
        task = tasks[progress.stage]
        bars.update(task, total=progress.total, completed=progress.done, detail=progress.detail)
        bars.update(task, rate=_rate(bars, task, progress.unit))

    with bars:
        yield on_progress


def _rate(bars: Any, task_id: TaskID, unit: str) -> str:
    """Return ``12.3 answers/s, 1m 05s left`` of one bar, or nothing while it is too early."""
    task = bars.tasks[bars.task_ids.index(task_id)]
    speed = task.finished_speed or task.speed
    if not speed:
        return ""
    left = task.time_remaining
    text = f"{speed:.3g} {unit}/s"
    return f"{text}, {duration(left)} left" if left and not task.finished else text


def duration(seconds: float) -> str:
    """Return a duration in words: ``8s``, ``2m 05s``, ``3h 20m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None
) -> Table:
    """Return a table whose columns of numbers are right-aligned; a missing number is a dash."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    built = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(cells) and all(row[index].isnumber for row in cells)
        built.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        built.add_row(*(Text(cell.text) for cell in row))
    return built


@dataclasses.dataclass(frozen=True)
class _Cell:
    text: str
    isnumber: bool


def _cell(value: Any) -> _Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _Cell("–", isnumber=True)
    if isinstance(value, bool):
        return _Cell("yes" if value else "no", isnumber=False)
    if isinstance(value, int):
        return _Cell(f"{value:,}", isnumber=True)
    if isinstance(value, float):
        return _Cell(f"{value:.4g}", isnumber=True)
    return _Cell(str(value), isnumber=False)


def with_interval(mean: float, low: float, high: float, *, digits: int = 1) -> str:
    """Return ``71.3 [68.0, 74.1]``, or a dash when there is no mean."""
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def emit_json(result: Any) -> None:
    """Write a result to stdout as one JSON document."""
    text = json.dumps(jsonable(result), indent=2, ensure_ascii=False)
    sys.stdout.write(text.translate(_ESCAPED) + "\n")


def jsonable(value: Any) -> Any:  # noqa: PLR0911 (a line per kind of value)
    """Return ``value`` as JSON can hold it: dataclasses and models as objects, arrays as lists,
    paths as text, NaN and infinities as null, secrets masked.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if hasattr(value, "model_dump"):  # a pydantic model; its secrets stay masked
        return jsonable(value.model_dump())
    if hasattr(value, "tolist"):  # numpy and torch, without importing them
        return jsonable(value.tolist())
    if isinstance(value, set | frozenset):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    return str(value)
