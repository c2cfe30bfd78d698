"""``pvec serve``: an OpenAI-compatible server, steered by request."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console
from pvec.cli.options import console_from, new_app, options, settings_from

if TYPE_CHECKING:
    from pvec.serve.server import Listening

app = new_app()

Vectors = Annotated[
    list[str] | None,
    typer.Option(
        "--vector",
        metavar="FILE",
        help="Vector file or run, or NAME=FILE (default name: the trait); repeatable.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        rich_help_panel="Server",
        help="Key that every request must carry. Other users of the machine can read a command "
        "line: prefer PVEC_SERVE__API_KEY in the environment or in .env.",
    ),
]


@app.command()
@options(
    "model.id", "model.adapter", "serve", "generation.max_tokens", "generation.thinking",
    "steer.kind", "steer.positions", "steer.operator", "steer.coef_unit",
    further=("model", "backend", "pool"),
)  # fmt: skip
def serve(ctx: typer.Context, vector: Vectors = None, api_key: ApiKey = None) -> None:
    """Serve a model to OpenAI clients, steered and measured by request.

    /v1/chat/completions and /v1/completions take a field `pvec` that steers with the vectors given
    here, and say where each answer lies on them; a page to try it is at /. Ctrl-C or SIGTERM lets
    running answers finish. Further options: docs/cli.md; the requests: docs/serve.md.
    """
    from pvec.serve.server import serve as run

    settings, console = settings_from(ctx), console_from(ctx)
    if api_key is not None:
        secret = {"api_key": _secret(api_key)}
        settings = settings.model_copy(update={"serve": settings.serve.model_copy(update=secret)})
    run(
        settings,
        vector or [],
        notify=console.note,
        on_progress=lambda _: None,
        on_ready=lambda listening, _stop: _ready(console, listening),
    )


def _ready(console: Console, listening: Listening) -> None:
    console.emit(listening, _render)
    sys.stdout.flush()  # whoever waits for the server reads a pipe


def _secret(key: str) -> object:
    from pydantic import SecretStr

    return SecretStr(key)


def _render(console: Console, listening: Listening) -> None:
    """Say where the server is and what it serves."""
    vectors = ", ".join(listening.vectors) or "none (--vector FILE)"
    console.print(f"serving {listening.model} at {listening.url}/v1")
    console.print(f"vectors: {vectors}")
    console.print(f"page: {listening.url}/   stop: Ctrl-C")
