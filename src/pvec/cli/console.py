"""Output of a command: results on stdout, progress and notes on stderr, JSON with ``--json``.

The only module, with the commands' own rendering, that writes to the terminal. Workflows know
nothing of it: they take ``on_progress`` and return results.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pvec.cli.progress import OnProgress, PlainProgress, bars

if TYPE_CHECKING:
    from rich.table import Table

Result = TypeVar("Result")

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

    def sentence(self, text: str) -> None:
        """Show a sentence of a result; on a terminal it is wrapped between words."""
        if not self.json:
            self.out.print(text, soft_wrap=not self.out.is_terminal)

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

    def call(self, feature: Callable[..., Result]) -> Result:
        """Return the result of a feature, its arguments bound (``functools.partial``), that shows
        its notes and its progress here.
        """
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

        Draws one bar per stage on a terminal, plain lines elsewhere, nothing with ``--quiet``.
        """
        if self.quiet:
            yield lambda _: None
        elif self.err.is_terminal:
            with bars(self.err) as on_progress:
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


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None
) -> Table:
    """Return a table whose columns of numbers are right-aligned, each with the same decimals; a
    missing number is a dash.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pvec.report.style import decimals

    built = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    texts = []
    for name, *values in zip(columns, *rows, strict=True):
        numeric = bool(values) and all(_is_number(value) for value in values)
        built.add_column(name, justify="right" if numeric else "left", overflow="fold")
        digits = decimals([value for value in values if isinstance(value, float)])
        texts.append([Text(_cell(value, digits)) for value in values])
    for row in zip(*texts, strict=True):
        built.add_row(*row)
    return built


def _is_number(value: Any) -> bool:
    """Whether a cell is a number, or one that is missing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{digits}f}" if round(value, digits) or not value else f"{value:.2g}"
    return str(value)


def with_interval(mean: float, low: float, high: float, *, digits: int = 1) -> str:
    """Return ``71.3 [68.0, 74.1]``, or a dash when there is no mean."""
    if math.isnan(mean):
        return "–"
    return f"{mean:,.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"


def emit_json(result: Any) -> None:
    """Write a result to stdout as one JSON document."""
    from pvec.runs.summary import jsonable

    text = json.dumps(jsonable(result), indent=2, ensure_ascii=False)
    sys.stdout.write(text.translate(_ESCAPED) + "\n")
