"""``pvec chat``: talk to a model while steering it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.chat_input import typed_lines
from pvec.cli.console import Console, visible
from pvec.cli.options import console_from, new_app, options, resolved_from, settings_from
from pvec.errors import InputError, PvecError

if TYPE_CHECKING:
    from pvec.evaluation.conversation import AnswerProjection, AnswerText, Conversation

app = new_app()

Vectors = Annotated[
    list[Path] | None,
    typer.Option("--vector", metavar="FILE", help="A vector file or a run with one; repeatable."),
]

Url = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Chat with a running pvec serve instead of a model."),
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
def chat(ctx: typer.Context, vector: Vectors = None, url: Url = None) -> None:
    """Chat with a model while steering it.

    Type a message, or a command: `/steer evil@20 2.0`, `/off`, `/compare`, `/help`, `/quit`.
    Ctrl-C stops an answer, not the program. Lines may also be piped in. On a terminal the arrow
    keys edit the line and recall earlier ones, and Tab completes commands and vectors.
    """
    settings, console = settings_from(ctx), console_from(ctx)
    if url is not None:
        _converse(console, _served(ctx, url, vector or []))
        return
    from pvec.backends.session import ModelSession
    from pvec.evaluation.chat import Chat, load_steering_vectors

    with console.progress() as on_progress:
        session = ModelSession(settings, notify=console.note, on_progress=on_progress)
        vectors = load_steering_vectors(settings, session, vector or [])
    with session:
        _ = session.backend  # load before the first question, not after it
        _converse(console, Chat(settings, session, vectors))


def _served(ctx: typer.Context, url: str, vectors: list[Path]) -> Conversation:
    """Return a conversation with a server, which has its own model and vectors."""
    from pvec.evaluation.served import ServedChat
    from pvec.judges.server import server_url

    resolved = resolved_from(ctx)
    origins = resolved.origins.items()
    own = ("model.", "backend.", "steer.kind")
    if vectors or any(
        path.startswith(own) and "command line" in origin for path, origin in origins
    ):
        raise InputError(
            "--vector and the options of the model and its engine do not go with --url: the server "
            "has its own."
        )
    server_url(url, option="--url")
    secret = resolved.settings.serve.api_key
    return ServedChat(
        resolved.settings, url, key=None if secret is None else secret.get_secret_value()
    )


def _converse(console: Console, talk: Conversation) -> None:
    console.note(talk.command("/status") or "")
    console.note("Type a message, or /help.")
    for line in typed_lines(console, talk.completions):
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


def _answer(console: Console, talk: Conversation, text: str) -> None:
    from pvec.evaluation.conversation import PLAIN

    side_by_side = talk.compare and talk.is_steered
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
            f"  {projection.vector}@{projection.layer}{side}: {projection.value}",
            style="dim",
            markup=False,
        )


def _show_plain(
    console: Console, events: Iterator[AnswerText | AnswerProjection]
) -> list[AnswerProjection]:
    """Write the answer as it grows; an unsteered one follows when both are done."""
    from pvec.evaluation.conversation import MAIN, PLAIN, AnswerText

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

    from pvec.evaluation.conversation import MAIN, PLAIN, AnswerText

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
