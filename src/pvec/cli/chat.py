"""``pvec chat``: talk to a model while steering it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, visible
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.errors import PvecError

if TYPE_CHECKING:
    from pvec.evaluation.chat import AnswerProjection, AnswerText, Chat

app = new_app()

Vectors = Annotated[
    list[Path] | None,
    typer.Option("--vector", metavar="FILE", help="A vector file or a run with one; repeatable."),
]


@app.command()
@options(
    "model",
    "backend",
    "generation",
    "steer.kind",
    "steer.layer",
    "steer.positions",
    "steer.operator",
    "steer.coef_unit",
)
def chat(ctx: typer.Context, vector: Vectors = None) -> None:
    """Chat with a model while steering it.

    Type a message, or a command: `/steer evil@20 2.0`, `/off`, `/compare`, `/help`, `/quit`.
    Ctrl-C stops an answer, not the program. Lines may also be piped in.
    """
    from pvec.backends.session import ModelSession
    from pvec.evaluation.chat import Chat, load_steering_vectors

    settings, console = settings_from(ctx), console_from(ctx)
    with console.progress() as on_progress:
        session = ModelSession(settings, notify=console.note, on_progress=on_progress)
        vectors = load_steering_vectors(settings, session, vector or [])
    with session:
        _ = session.backend  # load before the first question, not after it
        _converse(console, Chat(settings, session, vectors))


def _converse(console: Console, talk: Chat) -> None:
    console.note(talk.command("/status") or "")
    console.note("Type a message, or /help.")
    for line in _lines(console):
        if not line.strip():
            continue
        try:
            if line.lstrip().startswith("/"):
                reply = talk.command(line)
                if reply is None:
                    return
                console.out.print(reply, markup=False)
            else:
                _answer(console, talk, line.strip())
        except PvecError as error:
            console.err.print(f"Error: {error}", markup=False, soft_wrap=True)


def _lines(console: Console) -> Iterator[str]:
    """Yield what is typed or piped in, until it ends; Ctrl-C drops the line."""
    typed = sys.stdin.isatty()
    while True:
        try:
            if typed:
                console.out.print("you> ", style="bold", end="")
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            console.out.print("\n(/quit leaves)", markup=False)
            continue
        if not line:
            return
        yield line


def _answer(console: Console, talk: Chat, text: str) -> None:
    from pvec.evaluation.chat import PLAIN

    side_by_side = talk.compare and bool(talk.steering)
    projections: list[AnswerProjection] = []
    with closing(talk.answer(text)) as events:
        try:
            show = _show_columns if side_by_side and console.out.is_terminal else _show_plain
            projections = show(console, events)
        except KeyboardInterrupt:
            console.out.print("\n(stopped)", markup=False)
            return
    for projection in projections:
        side = " unsteered" if projection.side == PLAIN else ""
        console.out.print(
            f"  {projection.vector}@{projection.layer}{side}: projection "
            f"{projection.projection:+.3g} ({projection.relative:+.1%} of the residual norm)",
            style="dim",
            markup=False,
        )


def _show_plain(
    console: Console, events: Iterator[AnswerText | AnswerProjection]
) -> list[AnswerProjection]:
    """Write the answer as it grows; an unsteered one follows when both are done."""
    from pvec.evaluation.chat import MAIN, PLAIN, AnswerText

    written, other = "", ""
    projections: list[AnswerProjection] = []
    for event in events:
        if not isinstance(event, AnswerText):
            projections.append(event)
        elif event.side == PLAIN:
            other = event.text
        else:
            console.out.file.write(visible(event.text[len(written) :]))
            console.out.file.flush()
            written = event.text
            if event.done and event.side == MAIN:
                console.out.file.write("\n")
    if other:
        console.out.print(f"unsteered: {other}", markup=False, soft_wrap=True)
    return projections


def _show_columns(
    console: Console, events: Iterator[AnswerText | AnswerProjection]
) -> list[AnswerProjection]:
    """Show both answers side by side while they grow."""
    from rich.columns import Columns
    from rich.live import Live
    from rich.panel import Panel
    from rich.text import Text

    from pvec.evaluation.chat import MAIN, PLAIN, AnswerText

    texts = {MAIN: "", PLAIN: ""}
    titles = {MAIN: "steered", PLAIN: "unsteered"}
    projections: list[AnswerProjection] = []
    with Live(console=console.out, refresh_per_second=12) as live:
        for event in events:
            if isinstance(event, AnswerText):
                texts[event.side] = event.text
                half = max(console.out.width // 2 - 1, 20)
                panels = [
                    Panel(Text(texts[side]), title=titles[side], width=half) for side in texts
                ]
                live.update(Columns(panels, padding=0))
            else:
                projections.append(event)
    return projections
