"""``pvec project``: answers, prompts, training data and checkpoints on persona vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli import project_views as views
from pvec.cli.console import Console, OnProgress
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.errors import InputError

if TYPE_CHECKING:
    from pvec.backends.session import Notify
    from pvec.projection.monitor import MonitorResult
    from pvec.projection.project import ProjectResult
    from pvec.projection.ray import RayResult
    from pvec.projection.screen import ScreenResult
    from pvec.projection.shift import ShiftResult
    from pvec.settings import Settings

app = new_app()

SCREENING, MONITORING, SHIFTING = "Screening", "Monitoring", "Shift"

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="A .csv, .jsonl or .parquet file, a run folder, or a data set folder; with --shift "
        "the base model and its finetunes.",
    ),
]
Vectors = Annotated[
    list[str],
    typer.Option("--vector", metavar="FILE", help="A vector file or a run with one; repeatable."),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="PATH", help="Output file or run folder (default: by the input)."
    ),
]
InPlace = Annotated[
    bool, typer.Option("--in-place", help="Replace the input by the output, as a whole.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace columns, and output files, that are there.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read, and count them.")
]
Diff = Annotated[
    bool,
    typer.Option(
        "--diff",
        rich_help_panel=SCREENING,
        help="Screen training data by how far its answers point beyond the model's own.",
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        metavar="FILE",
        rich_help_panel=SCREENING,
        help="A clean data set: its percentile is the threshold of the filter.",
    ),
]
Prompts = Annotated[
    bool,
    typer.Option(
        "--prompts",
        rich_help_panel=MONITORING,
        help="Compare prompts, before they are answered, with the trait scores of their answers.",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="COLUMN",
        rich_help_panel=MONITORING,
        help="The file has trait scores in this column: generate and judge nothing.",
    ),
]
Condition = Annotated[
    str,
    typer.Option(
        "--condition",
        metavar="COLUMN",
        rich_help_panel=MONITORING,
        help="Column of the prompts' conditions (without it: their system prompts).",
    ),
]
Shifted = Annotated[
    bool,
    typer.Option(
        "--shift",
        rich_help_panel=SHIFTING,
        help="Measure how far finetuning moved models: BASE FINETUNED…",
    ),
]
Traits = Annotated[
    list[str] | None,
    typer.Option(
        "--trait",
        "-t",
        metavar="NAME|FILE",
        help="Trait to judge (--prompts), or to ask about (--shift); default: the vectors'.",
    ),
]
Questions = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        metavar="FILE",
        rich_help_panel=SHIFTING,
        help="Measure on the prompts of this file instead of a trait's evaluation questions.",
    ),
]


@app.command()
@options("model", "backend", "generation", "judge", "project", "paths")
def project(
    ctx: typer.Context,
    *,
    inputs: Inputs,
    vector: Vectors,
    out: Out = None,
    in_place: InPlace = False,
    overwrite: Overwrite = False,
    skip_bad: SkipBad = False,
    diff: Diff = False,
    reference: Reference = None,
    prompts: Prompts = False,
    score: Score = None,
    condition: Condition = "condition",
    shift: Shifted = False,
    trait: Traits = None,
    questions: Questions = None,
) -> None:
    """Project answers, training data, prompts or checkpoints on vectors.

    Every row of the file gets a column per vector, type and layer, named as in the reference, in
    one forward pass. Run it again after a stop and it goes on where it was.
    """
    settings, console = settings_from(ctx), console_from(ctx)
    asked = _Asked(
        settings=settings,
        inputs=inputs,
        vectors=vector,
        traits=tuple(trait or ()),
        out=out,
        in_place=in_place,
        overwrite=overwrite,
        skip_bad=skip_bad,
        reference=reference,
        score=score,
        condition=condition,
        questions=questions,
    )
    mode = _mode(asked, diff=diff, prompts=prompts, shift=shift)
    with console.progress() as on_progress:
        result = mode.run(asked, notify=console.note, on_progress=on_progress)
    console.emit(result, lambda shown: mode.render(shown, result))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The command line, but for what kind of job it is."""

    settings: Settings
    inputs: Sequence[str]
    vectors: Sequence[str]
    traits: tuple[str, ...]
    out: Path | None
    in_place: bool
    overwrite: bool
    skip_bad: bool
    reference: Path | None
    score: str | None
    condition: str
    questions: Path | None

    @property
    def file(self) -> Path:
        """The only input. Raises ``InputError`` for several."""
        if len(self.inputs) != 1:
            raise InputError(f"One file at a time: {len(self.inputs)} were given.")
        return Path(self.inputs[0])


@dataclass(frozen=True, kw_only=True)
class _Mode:
    """A kind of job: how it runs, how its result is shown, and the options of its own."""

    run: Callable[..., Any]
    render: Callable[[Console, Any], None]
    takes: frozenset[str] = frozenset()


def _mode(asked: _Asked, *, diff: bool, prompts: bool, shift: bool) -> _Mode:
    """Return the kind of job asked for. Raises ``InputError`` for two, or a stray option."""
    given = [n for n, on in (("--diff", diff), ("--prompts", prompts), ("--shift", shift)) if on]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} are two different jobs: give one.")
    name = given[0] if given else asked.settings.project.scale_out
    mode = _MODES[name]
    strays = {
        "--in-place": asked.in_place,
        "--reference": asked.reference is not None,
        "--score": asked.score is not None,
        "--questions": asked.questions is not None,
        "--trait": bool(asked.traits),
    }
    for option, present in strays.items():
        if present and option not in mode.takes:
            wanted = " or ".join(n for n, m in _MODES.items() if option in m.takes)
            raise InputError(f"{option} means nothing here: it goes with {wanted}.")
    return mode


def _run_file(asked: _Asked, *, notify: Notify, on_progress: OnProgress) -> ProjectResult:
    from pvec.projection import project as workflow

    ways = workflow.Ways(
        out=asked.out,
        in_place=asked.in_place,
        overwrite=asked.overwrite,
        skip_bad=asked.skip_bad,
    )
    return workflow.run(
        asked.settings, asked.file, asked.vectors, ways=ways, notify=notify, on_progress=on_progress
    )


def _run_ray(asked: _Asked, *, notify: Notify, on_progress: OnProgress) -> RayResult:  # noqa: ARG001
    from pvec.projection import ray as workflow

    return workflow.run(
        asked.settings,
        asked.file,
        asked.vectors,
        out=asked.out,
        overwrite=asked.overwrite,
        skip_bad=asked.skip_bad,
        notify=notify,
    )


def _run_diff(asked: _Asked, *, notify: Notify, on_progress: OnProgress) -> ScreenResult:
    from pvec.projection import screen as workflow

    files = workflow.ScreenFiles(
        reference=asked.reference,
        out=asked.out,
        overwrite=asked.overwrite,
        skip_bad=asked.skip_bad,
    )
    return workflow.run(
        asked.settings,
        asked.file,
        asked.vectors,
        files=files,
        notify=notify,
        on_progress=on_progress,
    )


def _run_prompts(asked: _Asked, *, notify: Notify, on_progress: OnProgress) -> MonitorResult:
    from pvec.projection import monitor as workflow

    study = workflow.Study(
        traits=asked.traits,
        score=asked.score,
        condition=asked.condition,
        out=asked.out,
        skip_bad=asked.skip_bad,
    )
    return workflow.run(
        asked.settings,
        asked.file,
        asked.vectors,
        study=study,
        notify=notify,
        on_progress=on_progress,
    )


def _run_shift(asked: _Asked, *, notify: Notify, on_progress: OnProgress) -> ShiftResult:
    from pvec.projection import shift as workflow

    return workflow.run(
        asked.settings,
        asked.inputs,
        asked.vectors,
        traits=asked.traits,
        questions=asked.questions,
        out=asked.out,
        notify=notify,
        on_progress=on_progress,
    )


_MODES = {
    "local": _Mode(run=_run_file, render=views.show_file, takes=frozenset({"--in-place"})),
    "ray": _Mode(run=_run_ray, render=views.show_ray),
    "--diff": _Mode(run=_run_diff, render=views.show_diff, takes=frozenset({"--reference"})),
    "--prompts": _Mode(
        run=_run_prompts, render=views.show_prompts, takes=frozenset({"--score", "--trait"})
    ),
    "--shift": _Mode(
        run=_run_shift, render=views.show_shift, takes=frozenset({"--questions", "--trait"})
    ),
}
