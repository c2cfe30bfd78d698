"""``pvec project``: answers, prompts, training data and checkpoints on persona vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli.console import Console, OnProgress, table, with_interval
from pvec.cli.extract import TINY_NOTE, render_judge
from pvec.cli.options import console_from, new_app, options, settings_from
from pvec.errors import InputError

if TYPE_CHECKING:
    from pvec.core.stats import Correlation, Interval
    from pvec.settings import Settings
    from pvec.workflows.engine import Say
    from pvec.workflows.project import ProjectResult
    from pvec.workflows.project_diff import ScreenResult
    from pvec.workflows.project_prompts import MonitorResult
    from pvec.workflows.project_ray import RayResult
    from pvec.workflows.project_shift import ShiftResult

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
        result = mode.run(asked, say=console.note, on_progress=on_progress)
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


def _run_file(asked: _Asked, *, say: Say, on_progress: OnProgress) -> ProjectResult:
    from pvec.workflows import project as workflow

    ways = workflow.Ways(
        out=asked.out,
        in_place=asked.in_place,
        overwrite=asked.overwrite,
        skip_bad=asked.skip_bad,
    )
    return workflow.run(
        asked.settings, asked.file, asked.vectors, ways=ways, say=say, on_progress=on_progress
    )


def _run_ray(asked: _Asked, *, say: Say, on_progress: OnProgress) -> RayResult:  # noqa: ARG001
    from pvec.workflows import project_ray as workflow

    return workflow.run(
        asked.settings,
        asked.file,
        asked.vectors,
        out=asked.out,
        overwrite=asked.overwrite,
        skip_bad=asked.skip_bad,
        say=say,
    )


def _run_diff(asked: _Asked, *, say: Say, on_progress: OnProgress) -> ScreenResult:
    from pvec.workflows import project_diff as workflow

    files = workflow.ScreenFiles(
        reference=asked.reference,
        out=asked.out,
        overwrite=asked.overwrite,
        skip_bad=asked.skip_bad,
    )
    return workflow.run(
        asked.settings, asked.file, asked.vectors, files=files, say=say, on_progress=on_progress
    )


def _run_prompts(asked: _Asked, *, say: Say, on_progress: OnProgress) -> MonitorResult:
    from pvec.workflows import project_prompts as workflow

    study = workflow.Study(
        traits=asked.traits,
        score=asked.score,
        condition=asked.condition,
        out=asked.out,
        skip_bad=asked.skip_bad,
    )
    return workflow.run(
        asked.settings, asked.file, asked.vectors, study=study, say=say, on_progress=on_progress
    )


def _run_shift(asked: _Asked, *, say: Say, on_progress: OnProgress) -> ShiftResult:
    from pvec.workflows import project_shift as workflow

    return workflow.run(
        asked.settings,
        asked.inputs,
        asked.vectors,
        traits=asked.traits,
        questions=asked.questions,
        out=asked.out,
        say=say,
        on_progress=on_progress,
    )


def _render_file(console: Console, result: ProjectResult) -> None:
    counts = result.counts
    notes = [
        (result.left_out, "rows left out that cannot be read"),
        (counts.empty, "answers without a token (empty cells)"),
        (counts.unanswered, "conversations that do not end with an answer"),
        (counts.truncated, "rows longer than the context (their prompt's beginning was cut)"),
        (counts.merged, "answers whose first token began in the prompt"),
        (len(result.kept), "columns kept as they were (--overwrite computes them again)"),
        (result.resumed, "rows done before"),
    ]
    _line(console, f"{result.input}: {result.rows:,} rows on {result.model}")
    for number, text in notes:
        if number:
            _line(console, f"  {number:,} {text}")
    if result.output is None:
        _line(console, "nothing to do: every column is there")
        return
    rows = [(c.column, c.mean, c.deviation, c.n, c.missing) for c in result.columns]
    console.print(table(("column", "mean", "sd", "n", "missing"), rows))
    _line(console, f"output: {result.output}")


def _render_ray(console: Console, result: RayResult) -> None:
    _line(
        console,
        f"{result.input}: {result.rows:,} rows on {result.model}, {result.workers} workers, "
        f"{len(result.columns)} columns",
    )
    _line(console, f"output: {len(result.files)} files in {result.output}")


def _render_diff(console: Console, result: ScreenResult) -> None:
    _line(
        console,
        f"{result.data}: {result.rows:,} samples, {result.prompts:,} prompts, "
        f"{result.generated:,} natural answers generated by {result.model}",
    )
    if result.unanswered:
        _line(console, f"  {result.unanswered:,} samples do not end with an answer")
    rows = [
        (
            f"{column.vector} @ {column.layer}",
            _interval(column.score.mean),
            None if column.score.reference is None else _interval(column.score.reference),
            column.score.auc,
            column.score.threshold,
            column.score.above if column.score.threshold is not None else None,
            None if column.agreement is None else column.agreement.r,
        )
        for column in result.columns
    ]
    columns = ("vector", "difference [95 %]", "clean set", "AUC", "threshold", "above", "agreement")
    console.print(table(columns, rows))
    for sample in result.suspicious[:3]:
        _line(console, f"line {sample.line}: {_cut(sample.question)}")
        _line(console, f"  trained on: {_cut(sample.response)}")
        _line(console, f"  its own:    {_cut(sample.natural)}")
    if result.kept is None:
        _line(console, "no clean reference set, so no threshold: give one with --reference FILE")
    else:
        kept = result.rows - result.removed_rows
        _line(console, f"kept:    {kept:,} samples in {result.kept}")
        _line(console, f"removed: {result.removed_rows:,} samples in {result.removed}")
    _next(console, result.model, result.next)


def _render_prompts(console: Console, result: MonitorResult) -> None:
    _line(
        console,
        f"{result.prompts:,} prompts under {result.conditions:,} conditions on {result.model} "
        f"({result.generated:,} answers generated)",
    )
    if result.judge is not None:
        render_judge(console, result.judge)
    rows = [
        (
            f"{column.vector} @ {column.layer}",
            column.metric,
            _correlation(column.overall),
            _correlation(column.within),
            column.overall.n,
        )
        for column in result.columns
    ]
    columns = ("vector", "score", "r overall [95 %]", "r within a condition [95 %]", "prompts")
    console.print(table(columns, rows))
    _next(console, result.model, result.next)


def _render_shift(console: Console, result: ShiftResult) -> None:
    _line(console, f"shift from {result.base} over {result.prompts:,} prompts")
    rows = [
        (one.checkpoint, f"{one.vector} @ {one.layer}", _interval(one.shift), one.score)
        for one in result.shifts
    ]
    console.print(table(("checkpoint", "vector", "shift [95 %]", "trait score"), rows))
    for trend in result.trends:
        _line(
            console,
            f"{trend.vector} @ {trend.layer}: shift and trait score correlate at "
            f"r {_correlation(trend.pearson)}, by rank {_correlation(trend.spearman)} "
            f"({trend.pearson.n} models)",
        )
    _next(console, result.base, result.next)


_MODES = {
    "local": _Mode(run=_run_file, render=_render_file, takes=frozenset({"--in-place"})),
    "ray": _Mode(run=_run_ray, render=_render_ray),
    "--diff": _Mode(run=_run_diff, render=_render_diff, takes=frozenset({"--reference"})),
    "--prompts": _Mode(
        run=_run_prompts, render=_render_prompts, takes=frozenset({"--score", "--trait"})
    ),
    "--shift": _Mode(
        run=_run_shift, render=_render_shift, takes=frozenset({"--questions", "--trait"})
    ),
}


def _line(console: Console, text: str) -> None:
    console.out.print(text, markup=False, soft_wrap=True)


def _next(console: Console, model: str, commands: Sequence[str]) -> None:
    for command in commands:
        _line(console, f"next:   {command}")
    if model == "tiny":
        console.note(TINY_NOTE)


def _interval(value: Interval) -> str:
    return with_interval(value.mean, value.low, value.high)


def _correlation(value: Correlation) -> str:
    return with_interval(value.r, value.low, value.high, digits=2)


def _cut(text: str, *, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]}…"
