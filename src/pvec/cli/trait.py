"""``pvec trait``: list, show and check trait definitions."""

from __future__ import annotations

from typing import Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options
from pvec.io.traits import Trait
from pvec.workflows.traits import TraitCheck, TraitSummary, check_traits, list_traits, show_trait

app = new_app("List, show and check trait definitions.")

_NAME = "A bundled trait's name, or the path of a trait's JSON file (pvec's or the reference's)."


@app.command("list")
@options()
def list_(ctx: typer.Context) -> None:
    """List the traits that ship with pvec."""
    traits = list_traits()
    console_from(ctx).emit(traits, lambda console: _render_list(console, traits))


@app.command()
@options()
def show(
    ctx: typer.Context, trait: Annotated[str, typer.Argument(metavar="TRAIT", help=_NAME)]
) -> None:
    """Show everything a trait says: instructions, questions, evaluation prompt."""
    found = show_trait(trait)
    console = console_from(ctx)
    for note in found.notes:
        console.note(note)
    result = {**found.to_json(), "hash": found.hash, "source": found.source}
    console.emit(result, lambda console: _render_trait(console, found))


@app.command()
@options()
def check(
    ctx: typer.Context, traits: Annotated[list[str], typer.Argument(metavar="TRAIT…", help=_NAME)]
) -> None:
    """Check traits: counts, duplicates, overlapping sets, the judge's prompt.

    Exits with 2 when there is an error; warnings alone exit with 0.
    """
    checks = check_traits(traits)
    result = [
        {
            "trait": one.trait,
            "source": one.source,
            "hash": one.hash,
            "usable": one.usable,
            "findings": one.findings,
            "notes": one.notes,
        }
        for one in checks
    ]
    console_from(ctx).emit(result, lambda console: _render_checks(console, checks))
    if not all(one.usable for one in checks):
        raise typer.Exit(2)


def _render_list(console: Console, traits: list[TraitSummary]) -> None:
    columns = ("trait", "what it is", "pairs", "extract", "eval")
    rows = [
        (t.name, t.description, t.instructions, t.extract_questions, t.eval_questions)
        for t in traits
    ]
    console.print(table(columns, rows))
    if traits:
        console.print(f"See one whole with: pvec trait show {traits[0].name}")


def _render_trait(console: Console, trait: Trait) -> None:
    head = [("description", trait.description or "–"), ("hash", trait.hash), ("from", trait.source)]
    console.print(table(("trait", trait.name), head))
    prompts = [
        (index + 1, trait.system_prompt("pos", index), trait.system_prompt("neg", index))
        for index in range(len(trait.instructions))
    ]
    _heading(console, "System prompts")
    console.print(table(("", "towards the trait", "away from it"), prompts))
    sets = (("Extraction", trait.extract_questions), ("Evaluation", trait.eval_questions))
    for name, questions in sets:
        numbered = [(index + 1, question) for index, question in enumerate(questions)]
        _heading(console, f"{name} questions")
        console.print(table(("", "question"), numbered))
    _heading(console, "Evaluation prompt")
    console.print(table(("text",), [(trait.eval_prompt,)]))


def _render_checks(console: Console, checks: list[TraitCheck]) -> None:
    for one in checks:
        errors = sum(finding.severity == "error" for finding in one.findings)
        warnings = len(one.findings) - errors
        verdict = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
        _heading(console, f"{one.trait}: {verdict if one.findings else 'nothing to correct'}")
        rows: list[tuple[str, str, str]] = [
            *((finding.severity, finding.where, finding.message) for finding in one.findings),
            *(("note", "", note) for note in one.notes),
        ]
        if rows:
            console.print(table(("severity", "where", "what"), rows))


def _heading(console: Console, text: str) -> None:
    from rich.text import Text

    console.print(Text(text, style="bold"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
