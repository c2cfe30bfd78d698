"""``pvec steer-eval``: what steering with a vector does, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli.console import Console, table
from pvec.cli.grid import Grid, run_on_grid
from pvec.cli.options import DryRun, console_from, new_app, options, settings_from
from pvec.cli.render import interval, render_judge, render_next, render_plan
from pvec.errors import InputError

if TYPE_CHECKING:
    from pvec.evaluation.conditions import Place
    from pvec.evaluation.effect_numbers import SideEffects
    from pvec.evaluation.steer_eval import SteerEvalPlan, SteerEvalResult
    from pvec.evaluation.summary import Pick, Point, SweepSummary
    from pvec.evaluation.tasks import TaskScore
    from pvec.stats import Interval

app = new_app()

TraitName = Annotated[
    str | None,
    typer.Option("--trait", "-t", metavar="NAME|FILE", help="A bundled trait or a .json file."),
]
Vectors = Annotated[
    list[Path] | None,
    typer.Option(
        "--vector",
        metavar="FILE",
        help="A vector file or a run with one; repeatable. None: the model unsteered.",
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option("--also", metavar="NAME|FILE", help="Judge this trait as well; repeatable."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="TASK",
        help="Capability: an lm-eval task, run unsteered and at the picked point; repeatable.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Run folder (default: runs/steer-TRAIT-MODEL)."
    ),
]


@app.command("steer-eval")
@options(
    "model", "backend", "pool.workers", "generation", "judge", "steer", "paths", further=("pool",)
)
def steer_eval(
    ctx: typer.Context,
    trait: TraitName = None,
    vector: Vectors = None,
    also: Also = None,
    tasks: Tasks = None,
    out: Out = None,
    grid: Grid = None,
    dry_run: DryRun = False,
) -> None:
    """Evaluate steering: trait and coherence by layer and coefficient.

    Every layer and coefficient, a random vector of the same norm, the trait asked for in the
    prompt, and the unsteered model answer the same questions in one pass. Layer and coefficient
    are picked on half of the questions and reported on the other half; with `--search N` only N
    points are tried, on the first half. Run it again and it finishes what is missing. A grid file
    runs every vector that `pvec extract` made with it.
    """
    arguments: dict[str, Any] = {"also": also or (), "tasks": tasks or ()}
    if grid is not None:
        refused = {"--trait": trait, "--vector": vector}
        run_on_grid(
            ctx, "steer-eval", grid, out=out, dry_run=dry_run, refused=refused, arguments=arguments
        )
        return
    if trait is None:
        raise InputError("No trait was named: give --trait NAME (`pvec trait list` shows them).")
    from pvec.evaluation import steer_eval as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    arguments |= {"vectors": vector or (), "out": out}
    if dry_run:
        plan = workflow.plan(settings, trait, notify=console.note, **arguments)
        console.emit(plan, _render_plan)
    else:
        work = partial(workflow.run, settings, trait, **arguments)
        console.emit(console.call(work), _render)


def _render_plan(console: Console, plan: SteerEvalPlan) -> None:
    render_plan(console, plan, head=f"{plan.trait}: {len(plan.conditions)} conditions, ")
    if plan.search_answers:
        console.print(f"  search: at most {plan.search_answers:,} answers more")
    if plan.side_answers or plan.side_texts:
        console.print(
            f"  side effects: {plan.side_answers:,} answers to generate, {plan.side_texts:,} "
            f"benign texts to read under each condition"
        )
    for condition in plan.conditions:
        console.print(f"  {condition}")


def _render(console: Console, result: SteerEvalResult) -> None:
    console.print(
        f"{result.trait} in {result.model}: {result.conditions} conditions, {result.answers:,} "
        f"answers ({result.generated:,} new, {result.cut:,} cut at the token limit)"
    )
    if result.judge is not None:
        render_judge(console, result.judge)
    if result.searched:
        console.sentence(
            f"searched {result.searched} points; those that were not picked have answers to half "
            f"of the questions"
        )
    if result.numbers is not None:
        _render_points(console, result.numbers)
        for pick in result.numbers.picks:
            _render_pick(console, pick, result.trait)
        for vector in result.numbers.unpicked:
            console.print(f"nothing picked for {vector}")
    if result.side_effects is not None:
        _render_effects(console, result.side_effects)
    if result.capability:
        _render_tasks(console, result.capability)
    render_next(console, result.next, model=result.model)


def _render_points(console: Console, sweep: SweepSummary) -> None:
    """Show every condition but the random ones, which stand beside what they control."""
    controlled = bool(sweep.having("random"))
    common = _common_name(sweep.points)
    limits = any(point.limited is not None for point in sweep.points)
    rows = []
    for point in sweep.points:
        if point.role == "random":
            continue
        row: list[Any] = [point.name.removeprefix(common)]
        row += [interval(point.scores[metric]) for metric in sweep.metrics]
        if controlled:
            control = sweep.control_of(point)
            row.append(f"{control.scores[sweep.metrics[0]].mean:.1f}" if control else "")
        if limits:
            row.append("" if point.limited is None else f"{point.limited:.0%}")
        row.append(min(point.scores[metric].n for metric in sweep.metrics))
        rows.append(row)
    columns = ["condition", *(f"{metric} [95 %]" for metric in sweep.metrics)]
    columns += ["random"] if controlled else []
    columns += ["beyond"] if limits else []
    console.print(table([*columns, "n"], rows))
    if limits:
        console.print("beyond: share of the tokens held to the limit that lay beyond it")
    if sweep.missing:
        console.print(f"{sweep.missing:,} scores are missing and in no mean")


def _render_pick(console: Console, pick: Pick, trait: str) -> None:
    console.print(
        f"picked: {pick.point.name} ({pick.reason}); "
        f"read on {pick.questions_for_reading} {'other' if pick.held_out else 'same'} questions:"
    )
    points: dict[str, Point | None] = {
        "unsteered": pick.baseline,
        "picked": pick.point,
        "random": pick.control,
        "prompted": pick.prompt,
    }
    rows = [
        (name, *map(interval, point.scores.values()), _signed(point.differences.get(trait)))
        for name, point in points.items()
        if point is not None
    ]
    console.print(table(("", *pick.point.scores, "vs unsteered"), rows))


_ON_TEXTS = {
    "kl": "KL",
    "perplexity": "perplexity",
    "refused_harmless": "harmless\nrefused, %",
    "refused_harmful": "harmful\nrefused, %",
}
_OF_ANSWERS = {
    "tokens": "tokens",
    "repetition": "repeated\n4-grams, %",
    "other_script": "other\nscript, %",
    "wrong_way": "wrong\nway, %",
}


def _render_effects(console: Console, effects: SideEffects) -> None:
    """Show the means of every condition; intervals are in the table of the run and the report."""
    console.print(
        f"side effects: KL from the unsteered model (nats per token) and perplexity on "
        f"{effects.texts} benign texts"
        + (f", refusals of {effects.questions} questions of each kind" * (effects.questions > 0))
    )
    _render_measures(console, effects, _ON_TEXTS)
    console.print("of the answers: tokens, repetition, letters, questions moved the wrong way")
    _render_measures(console, effects, _OF_ANSWERS)


def _render_measures(console: Console, effects: SideEffects, headings: Mapping[str, str]) -> None:
    common = _common_name(effects.points)
    shown = [measure for measure in effects.measures if measure in headings]
    rows: list[list[Any]] = []
    for point in effects.points:
        if point.role != "random" and shown:
            values = [point.measures.get(measure) for measure in shown]
            control = effects.control_of(point).get(shown[0])
            rows.append([
                point.name.removeprefix(common),
                *(value.mean if value else None for value in values),
                control.mean if control else None,
            ])  # fmt: skip
    first = headings[shown[0]].partition("\n")[0] if shown else ""
    columns = ["condition", *(headings[measure] for measure in shown), f"{first},\nrandom"]
    if all(row[-1] is None for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    if rows:
        console.print(table(columns, rows))


def _common_name(points: Sequence[Place]) -> str:
    """Return what the names of all steered conditions begin with: the vector, if there is one."""
    vectors = {point.vector for point in points if point.role == "steered"}
    return f"{vectors.pop()} · " if len(vectors) == 1 else ""


def _render_tasks(console: Console, scores: Sequence[TaskScore]) -> None:
    rows = [(s.condition, s.task, s.metric, s.score, s.stderr, s.n) for s in scores]
    console.print(table(("condition", "task", "metric", "score", "stderr", "n"), rows))


def _signed(difference: Interval | None) -> str:
    if difference is None or difference.n == 0:
        return ""
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
