"""``pvec doctor``: whether pvec can work here, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, settings_from

if TYPE_CHECKING:
    from pvec.doctor.doctor import Diagnosis

app = new_app()


@app.command()
@options("paths")
def doctor(ctx: typer.Context) -> None:
    """Look whether pvec can work here, and what is missing.

    Python, packages, device, memory, folders, keys (never shown) and the bundled model, which is
    loaded and asked. Changes nothing and uses no network. Exits with 2 when pvec cannot work.
    """
    from pvec.doctor.doctor import examine

    settings, console = settings_from(ctx), console_from(ctx)
    with console.progress() as on_progress:
        diagnosis = examine(settings, on_progress=on_progress)
    result = {"able": diagnosis.able, "areas": diagnosis.areas}
    console.emit(result, lambda shown: _render(shown, diagnosis))
    if not diagnosis.able:
        raise typer.Exit(2)


def _render(console: Console, diagnosis: Diagnosis) -> None:
    for area, findings in diagnosis.areas.items():
        good = [one for one in findings if one.state == "ok"]
        if area == "packages" and len(good) == len(findings):
            console.print(f"{area}: all {len(good)} that pvec needs are here")
            continue
        rows = [(_MARKS[one.state], one.name, one.found) for one in findings]
        console.print(table(("", area, ""), rows))
    lacking = [
        (one.name, one.remedy)
        for found in diagnosis.areas.values()
        for one in found
        if one.state != "ok" and one.remedy
    ]
    if lacking:
        console.print(table(("what is not there", "how to get it"), lacking))
    console.print(
        "pvec can work here: pvec extract --trait evil"
        if diagnosis.able
        else "pvec cannot work here: see the lines marked BROKEN"
    )


_MARKS = {"ok": "ok", "missing": "–", "broken": "BROKEN"}
