"""``pvec project``: the rows of a file on persona vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli import monitor, screen, shift
from pvec.cli.console import Console, table
from pvec.cli.options import RETIRED_PANEL, console_from, new_app, options, settings_from
from pvec.cli.projection import READING, SkipBad, Vectors, line, output_options
from pvec.cli.render import thinking_note
from pvec.errors import InputError

if TYPE_CHECKING:
    from pvec.projection.inputs import OutputOptions
    from pvec.projection.project import ProjectResult
    from pvec.projection.ray import RayResult
    from pvec.settings import Settings

app = new_app()

NEW_NAMES = {"--diff": "pvec screen", "--prompts": "pvec monitor", "--shift": "pvec shift"}
"""Flag of `pvec project` → the command that does its job now."""

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE",
        help="A table, data set folder or run.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Output file (default: by the input)."),
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Replace the input by the output.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace columns and files that exist.")
]


def _old(*flags: str) -> Any:
    """Return an option that belongs to another command now."""
    return typer.Option(*flags, hidden=True, rich_help_panel=RETIRED_PANEL)


@app.command()
@options(
    "model.id", "model.adapter", "project.layers", "project.types", "project.turns",
    further=(*READING, "model", "backend", "generation.thinking", "project.kind",
             "project.same_model", "project.chunk_rows", "project.scale_out",
             "project.workers", "paths"),
    retired=("generation", "judge", "project"),
)  # fmt: skip
def project(
    ctx: typer.Context,
    *,
    inputs: Inputs,
    vector: Vectors,
    out: Out = None,
    in_place: InPlace = False,
    overwrite: Overwrite = False,
    skip_bad: SkipBad = False,
    diff: Annotated[bool, _old("--diff")] = False,
    reference: Annotated[Path | None, _old("--reference")] = None,
    prompts: Annotated[bool, _old("--prompts")] = False,
    score: Annotated[str | None, _old("--score")] = None,
    condition: Annotated[str, _old("--condition")] = "condition",
    shifted: Annotated[bool, _old("--shift")] = False,
    trait: Annotated[list[str] | None, _old("--trait", "-t")] = None,
    questions: Annotated[Path | None, _old("--questions")] = None,
) -> None:
    """Project the rows of a file on vectors.

    Every row gets a column per vector, type and layer. The same command continues where it was
    stopped. Other columns: --prompt-column, --answer-column, --messages-column; --plain-prompts for
    prompts that are questions, not rendered yet. Further options: docs/cli.md.
    """
    settings, console = settings_from(ctx), console_from(ctx)
    output = output_options(out=out, in_place=in_place, overwrite=overwrite, skip_bad=skip_bad)
    old = {"--diff": diff, "--prompts": prompts, "--shift": shifted}
    others = {
        "--reference": ("--diff", reference is not None),
        "--score": ("--prompts", score is not None),
        "--questions": ("--shift", questions is not None),
        "--trait": ("--prompts or --shift", bool(trait)),
    }
    flag = _old_flag(old, others, in_place=in_place)
    if flag:
        console.note(f"`pvec project {flag}` is `{NEW_NAMES[flag]}` now")
    if flag == "--shift":
        shift.execute(
            settings, console, inputs, vector, traits=trait or (), questions=questions, out=out
        )
        return
    if len(inputs) != 1:
        raise InputError(f"One file at a time: {len(inputs)} were given.")
    path = Path(inputs[0])
    if flag == "--diff":
        screen.execute(settings, console, path, vector, reference=reference, output=output)
    elif flag == "--prompts":
        monitor.execute(
            settings, console, path, vector,
            traits=trait or (), score=score, condition=condition, output=output,
        )  # fmt: skip
    elif settings.project.scale_out == "ray":
        _project_on_ray(settings, console, path, vector, output)
    else:
        _project(settings, console, path, vector, output)


def _old_flag(
    jobs: Mapping[str, bool], options: Mapping[str, tuple[str, bool]], *, in_place: bool
) -> str | None:
    """Return the old flag of another command that was given, if any.

    ``options`` are those of the other commands, each with its flags and whether it was given.
    Raises ``InputError`` for two flags, and for an option that does not go with them.
    """
    flags = [flag for flag, given in jobs.items() if given]
    if len(flags) > 1:
        raise InputError(f"{flags[0]} and {flags[1]} are two different jobs: give one.")
    flag = flags[0] if flags else None
    for option, (goes_with, given) in options.items():
        if given and (flag is None or flag not in goes_with):
            names = " or ".join(NEW_NAMES[old] for old in goes_with.split(" or "))
            raise InputError(f"{option} has no effect here: it goes with {goes_with} ({names}).")
    if flag and in_place:
        raise InputError("--in-place has no effect here: it goes with `pvec project FILE`.")
    return flag


def _project(
    settings: Settings, console: Console, path: Path, vectors: Sequence[str], output: OutputOptions
) -> None:
    from pvec.projection import project as workflow

    with console.progress() as on_progress:
        result = workflow.run(
            settings, path, vectors, output=output, notify=console.note, on_progress=on_progress
        )
    console.emit(result, lambda shown: _render(shown, result))


def _project_on_ray(
    settings: Settings, console: Console, path: Path, vectors: Sequence[str], output: OutputOptions
) -> None:
    from pvec.projection import ray as workflow

    if output.in_place:
        raise InputError("--in-place has no effect here: --engine ray writes a folder of files.")
    result = workflow.run(settings, path, vectors, output=output, notify=console.note)
    console.emit(result, lambda shown: _render_ray(shown, result))


def _render(console: Console, result: ProjectResult) -> None:
    """Show what was added to a file, and what was odd about its rows."""
    counts = result.counts
    notes = [
        (result.left_out, "rows left out that cannot be used"),
        (counts.empty, "answers without a token (empty cells)"),
        (counts.unanswered, "conversations that do not end with an answer"),
        (counts.truncated, "rows longer than the context (their prompt's beginning was cut)"),
        (counts.cut_answers, "of them with an answer that is longer by itself (it was cut too)"),
        (counts.merged, "answers whose first token began in the prompt"),
        (counts.thinking, thinking_note(counts.think_tokens)),
        (len(result.kept), "columns kept as they were (--overwrite computes them again)"),
        (result.resumed, "rows done before"),
    ]
    line(console, f"{result.input}: {result.rows:,} rows on {result.model}")
    for number, text in notes:
        if number:
            line(console, f"  {number:,} {text}")
    if result.output is None:
        line(console, "nothing to do: every column is there")
        return
    rows = [(c.column, c.mean, c.deviation, c.n, c.missing) for c in result.columns]
    console.print(table(("column", "mean", "sd", "n", "missing"), rows))
    line(console, f"output: {result.output}")


def _render_ray(console: Console, result: RayResult) -> None:
    """Show where the parts went."""
    line(
        console,
        f"{result.input}: {result.rows:,} rows on {result.model}, {result.workers} workers, "
        f"{len(result.columns)} columns",
    )
    line(console, f"output: {len(result.files)} files in {result.output}")
