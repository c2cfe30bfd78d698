"""``pvec config``: every setting, its value, and where the value comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, resolved_from
from pvec.runs.secrets import without_secrets

app = new_app()


@app.command()
@options("model", "backend", "generation", "judge", "filter", "paths")
def config(ctx: typer.Context) -> None:
    """Show every setting and where its value comes from.

    Order: command line, environment and `.env`, `pvec.yaml` or `--config FILE`, defaults.
    """
    resolved = resolved_from(ctx)
    rows = [(path, without_secrets(value), origin) for path, value, origin in resolved.rows()]
    result = {path: {"value": value, "origin": origin} for path, value, origin in rows}
    console_from(ctx).emit(result, lambda console, _: _render(console, rows))


def _render(console: Console, settings: Sequence[tuple[str, Any, str]]) -> None:
    rows = ((path, "" if value is None else str(value), at) for path, value, at in settings)
    console.print(table(("setting", "value", "from"), rows))
