"""``pvec trait``: list, show, check and write trait definitions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.traits.listing import TraitCheck, TraitSummary, check_traits, list_traits, show_trait
from pvec.traits.trait import Trait

if TYPE_CHECKING:
    from pvec.extraction.new_trait import NewTrait

app = new_app("List, show, check and write trait definitions.")

_NAME = (
    "The name of a bundled trait or of one in my-traits, or the path of a trait's JSON file "
    "(pvec's or the reference's)."
)


@app.command("list")
@options()
def list_(ctx: typer.Context) -> None:
    """List the traits that ship with pvec, and yours in `my-traits`."""
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


@app.command()
@options("author")
def new(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the new trait, such as grumpy.")
    ],
    description: Annotated[
        str,
        typer.Option(
            "--description", "-d", metavar="TEXT", help="What the trait is, in a sentence."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Trait file (default: my-traits/NAME.json)."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a trait file that is there.")
    ] = False,
) -> None:
    """Have a model write a new trait from its name and a sentence.

    Five pairs of instructions, forty questions (twenty to make the vector from, twenty to test it
    on) and the judge's prompt, as in the paper. What `pvec trait check` would find is sent back to
    be corrected; the file is written whole or not at all. Read it before you spend money on it.
    """
    from pvec.extraction.new_trait import new_trait

    settings, console = settings_from(ctx), console_from(ctx)
    with console.progress() as on_progress:
        made = new_trait(
            settings,
            name,
            description=description,
            out=out,
            force=force,
            notify=console.note,
            on_progress=on_progress,
        )
    result = {
        "trait": made.trait.name,
        "path": made.path,
        "hash": made.trait.hash,
        "model": made.model,
        "corrections": made.corrections,
        "spent": made.spent,
        "next": made.next,
    }
    console.emit(result, lambda shown: _render_new(shown, made))


def _render_new(console: Console, made: NewTrait) -> None:
    trait = made.trait
    spent = f", ${made.spent:.2f}" if made.spent else ""
    written = (
        f"{trait.name}: written by {made.model} ({_count(made.corrections, 'correction')}{spent})"
    )
    console.out.print(written, markup=False, soft_wrap=True)
    rows = [
        ("towards it", trait.system_prompt("pos", 0)),
        ("away from it", trait.system_prompt("neg", 0)),
        ("a question", trait.extract_questions[0]),
        ("for the judge", trait.eval_prompt.splitlines()[1]),
    ]
    console.print(table(("one of each", ""), rows))
    console.out.print(f"trait:  {made.path}", markup=False, soft_wrap=True)
    for word, command in zip(("next", "then"), made.next, strict=True):
        console.out.print(f"{word}:   {command}", markup=False, soft_wrap=True)


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
