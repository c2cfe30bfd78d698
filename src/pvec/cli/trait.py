"""``pvec trait``: list, show, check and write trait definitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvec.cli.console import Console, table
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.cli.render import render_next
from pvec.traits.check import TraitCheck, TraitIssue, check_file
from pvec.traits.trait import Trait, list_traits, load_trait

if TYPE_CHECKING:
    from pvec.extraction.new_trait import NewTrait

app = new_app("List, show, check and write trait definitions.")

_NAME = (
    "The name of a bundled trait or of one in my-traits, or the path of a trait's JSON file "
    "(pvec's or the reference's)."
)


_MOST_PLACES = 3
"""Places listed for issues that say the same."""


@app.command("list")
@options()
def list_(ctx: typer.Context) -> None:
    """List the traits that ship with pvec, and yours in `my-traits`."""
    traits = list_traits()
    result = [
        {
            "name": trait.name,
            "description": trait.description,
            "source": trait.source,
            "hash": trait.hash,
            "instructions": len(trait.instructions),
            "extract_questions": len(trait.extract_questions),
            "eval_questions": len(trait.eval_questions),
        }
        for trait in traits
    ]
    console_from(ctx).emit(result, lambda console, _: _render_list(console, traits))


@app.command()
@options()
def show(
    ctx: typer.Context, trait: Annotated[str, typer.Argument(metavar="TRAIT", help=_NAME)]
) -> None:
    """Show everything a trait says: instructions, questions, evaluation prompt."""
    loaded = load_trait(trait)
    console = console_from(ctx)
    for note in loaded.notes:
        console.note(note)
    result = {**loaded.to_json(), "hash": loaded.hash, "source": loaded.source}
    console.emit(result, lambda console, _: _render_trait(console, loaded))


@app.command()
@options()
def check(
    ctx: typer.Context, traits: Annotated[list[str], typer.Argument(metavar="TRAIT…", help=_NAME)]
) -> None:
    """Check traits: counts, duplicates, overlapping sets, the judge's prompt.

    Exits with 2 when there is an error; warnings alone exit with 0.
    """
    checks = [check_file(trait) for trait in traits]
    result = [{**vars(check), "usable": check.usable} for check in checks]
    console_from(ctx).emit(result, lambda console, _: _render_checks(console, checks))
    if not all(check.usable for check in checks):
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
    written = console.call(
        partial(new_trait, settings, name, description=description, out=out, force=force)
    )
    result = {
        "trait": written.trait.name,
        "path": written.path,
        "hash": written.trait.hash,
        "model": written.model,
        "corrections": written.corrections,
        "spent": written.spent,
        "next": written.next,
    }
    console.emit(result, lambda console, _: _render_new(console, written))


def _render_new(console: Console, new_trait: NewTrait) -> None:
    trait = new_trait.trait
    spent = f", ${new_trait.spent:.2f}" if new_trait.spent else ""
    corrections = _count(new_trait.corrections, "correction")
    console.print(f"{trait.name}: written by {new_trait.model} ({corrections}{spent})")
    rows = [
        ("towards it", trait.system_prompt("pos", 0)),
        ("away from it", trait.system_prompt("neg", 0)),
        ("a question", trait.extract_questions[0]),
        ("for the judge", trait.eval_prompt.splitlines()[1]),
    ]
    console.print(table(("one of each", ""), rows))
    console.print(f"trait:  {new_trait.path}")
    render_next(console, new_trait.next)


def _render_list(console: Console, traits: list[Trait]) -> None:
    columns = ("trait", "what it is", "pairs", "extract", "eval")
    rows = [
        (
            trait.name,
            trait.description,
            len(trait.instructions),
            len(trait.extract_questions),
            len(trait.eval_questions),
        )
        for trait in traits
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
    for check in checks:
        errors = sum(issue.severity == "error" for issue in check.findings)
        warnings = len(check.findings) - errors
        verdict = f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"
        _heading(console, f"{check.trait}: {verdict if check.findings else 'nothing to correct'}")
        rows = [*_alike(check.findings), *(("note", "", note) for note in check.notes)]
        if rows:
            console.print(table(("severity", "where", "what"), rows))


def _alike(issues: Sequence[TraitIssue]) -> Iterator[tuple[str, str, str]]:
    """Yield severity, places and message, with issues of the same message in one row."""
    places: dict[tuple[str, str], list[str]] = {}
    for issue in issues:
        places.setdefault((issue.severity, issue.message), []).append(issue.where)
    for (severity, message), where in places.items():
        more = f" and {len(where) - _MOST_PLACES} more" if len(where) > _MOST_PLACES else ""
        yield severity, ", ".join(where[:_MOST_PLACES]) + more, message


def _heading(console: Console, text: str) -> None:
    from rich.text import Text

    console.print(Text(text, style="bold"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
