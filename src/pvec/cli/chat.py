"""``pvec chat``: talk to a model while steering it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

_LINES_KEPT = 1000
"""Of the history of what was typed."""


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
        vectors = load_steering_vectors(session, vector or [])
    with session:
        _ = session.backend  # load before the first question, not after it
        _converse(console, Chat(session, vectors))


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


def typed_lines(console: Console, completions: Callable[[str], list[str]]) -> Iterator[str]:
    """Yield what is typed or piped in, until it ends; Ctrl-C drops the line.

    On a terminal the arrow keys edit the line and recall earlier ones, of earlier chats too, and
    Tab completes what ``completions`` returns for the line so far.
    """
    typed = sys.stdin.isatty()
    prompt = "you> "
    if typed and _use_readline(console, completions):
        prompt = f"\001\033[1m\002{prompt}\001\033[0m\002"  # bold, and of no width
    while True:
        try:
            line = f"{input(prompt)}\n" if typed else sys.stdin.readline()
        except EOFError:
            console.out.print()
            return
        except KeyboardInterrupt:
            console.out.print("\n(/quit leaves)", markup=False)
            continue
        if not line:
            return
        yield line


def _use_readline(console: Console, completions: Callable[[str], list[str]]) -> bool:
    """Set up readline where Python has it (not on Windows); its history is a private file."""
    try:
        import readline
    except ImportError:
        return False
    import atexit

    def complete(_: str, state: int) -> str | None:
        start = readline.get_begidx()
        found = completions(readline.get_line_buffer()[: readline.get_endidx()])
        words = [word if start == 0 else word.rpartition(" ")[2] for word in found]
        return [f"{word} " for word in words][state] if state < len(words) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    on_mac = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if on_mac else "tab: complete")
    readline.set_history_length(_LINES_KEPT)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "pvec" / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    except OSError as error:
        console.note(f"no history of earlier chats: {path}: {error.strerror}")
    else:
        atexit.register(readline.write_history_file, path)
    return True
