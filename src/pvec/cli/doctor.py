"""``pvec doctor``: check the installation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, settings_from

if TYPE_CHECKING:
    from pvec.doctor import Diagnosis

app = new_app()


@app.command()
@options("paths")
def doctor(ctx: typer.Context) -> None:
    """Check the installation.

    Checks Python, packages, device, memory, folders, keys (never shown) and the bundled model,
    which is loaded and asked a question. Changes nothing and uses no network. Exits with code 2
    when pvec cannot work.
    """
    from pvec.doctor import examine

    settings, console = settings_from(ctx), console_from(ctx)
    with console.progress() as on_progress:
        diagnosis = examine(settings, on_progress=on_progress)
    result = {"able": diagnosis.able, "areas": diagnosis.areas}
    console.emit(result, lambda console, _: _render(console, diagnosis))
    if not diagnosis.able:
        raise typer.Exit(2)


def _render(console: Console, diagnosis: Diagnosis) -> None:
    for area, checks in diagnosis.areas.items():
        if area == "packages" and all(check.state == "ok" for check in checks):
            console.print(f"{area}: all {len(checks)} required packages are installed")
            continue
        rows = [(_MARKS[check.state], check.name, check.found) for check in checks]
        console.print(table(("", area, ""), rows))
    remedies = [
        (check.name, check.remedy)
        for checks in diagnosis.areas.values()
        for check in checks
        if check.state != "ok" and check.remedy
    ]
    if remedies:
        console.print(table(("not available", "how to get it"), remedies))
    console.print(
        "pvec can work here. Try: pvec extract --trait evil"
        if diagnosis.able
        else "pvec cannot work here: see the lines marked BROKEN"
    )


_MARKS = {"ok": "ok", "missing": "–", "broken": "BROKEN"}
