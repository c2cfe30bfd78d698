"""``pvec extract``: a trait's persona vector from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvec.cli.console import Console, table, with_interval
from pvec.cli.options import console_from, new_app, options, settings_from

if TYPE_CHECKING:
    from pvec.extraction.extract import ExtractPlan, ExtractResult
    from pvec.extraction.judge import MetricMean
    from pvec.judges.scoring import JudgeReport
    from pvec.types import Sign
    from pvec.vectors.quality import LayerRow, VectorSummary

app = new_app()

Traits = Annotated[
    list[str],
    typer.Option(
        "--trait", "-t", metavar="NAME|FILE", help="A bundled trait or a .json file; repeatable."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder (default: runs/TRAIT-MODEL)."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say how much would be generated and judged, and its cost."),
]

TINY_NOTE = (
    "The bundled model is a teaching aid: these numbers are about it, not about real assistants."
)


@app.command()
@options("model", "backend", "generation", "judge", "filter", "extract", "paths")
def extract(ctx: typer.Context, trait: Traits, out: Out = None, dry_run: DryRun = False) -> None:
    """Make the persona vector of one or more traits.

    Generates answers under opposite system prompts, judges them, keeps those that show the trait
    (or do not), and takes the difference of their mean activations. Run it again and it finishes
    what is missing.
    """
    from pvec.extraction import extract as workflow

    settings, console = settings_from(ctx), console_from(ctx)
    if dry_run:
        plans = workflow.plan(settings, trait, out=out)
        console.emit(plans, lambda shown: _render_plans(shown, plans))
        return
    with console.progress() as on_progress:
        results = workflow.run(
            settings, trait, out=out, notify=console.note, on_progress=on_progress
        )
    console.emit(results, lambda shown: _render(shown, results))


def _render_plans(console: Console, plans: Sequence[ExtractPlan]) -> None:
    for plan in plans:
        console.print(
            f"{plan.trait}: {plan.missing:,} of {plan.answers:,} answers to generate "
            f"(at most {plan.most_tokens:,} tokens) into {plan.run}"
        )
        console.print(f"  judge {plan.judge}: {plan.judging}")


def _render(console: Console, results: Sequence[ExtractResult]) -> None:
    for result in results:
        console.print(
            f"[bold]{result.trait}[/bold] in {result.model}: {result.answers:,} answers "
            f"({result.generated:,} new, {result.cut:,} cut at the token limit)"
        )
        if result.judge is not None:
            render_judge(console, result.judge)
        if result.vector is not None:
            render_means(console, result.vector.scores)
            render_filter(console, result.vector.filtered)
            _render_layers(console, result.vector.summary)
            console.print(f"vector: {result.vector.path}")
        for position, command in enumerate(result.next):
            console.out.print(
                f"{'next' if position == 0 else 'then'}:   {command}",
                markup=False,
                soft_wrap=True,
            )
    if any(result.model == "tiny" for result in results):
        console.note(TINY_NOTE)


def render_judge(console: Console, report: JudgeReport) -> None:
    """Say who judged, how much, what is missing and what it cost."""
    counts = ", ".join(f"{count:,} {status}" for status, count in report.counts.items())
    parts = [f"{counts or 'nothing new'}", f"{report.skipped:,} scored before"]
    if report.unasked:
        parts.append(f"{report.unasked:,} not asked ({report.stopped})")
    if report.spent:
        parts.append(f"${report.spent:.2f}")
    console.print(f"judge {report.judge}: {', '.join(parts)}")


def render_means(console: Console, means: Sequence[MetricMean]) -> None:
    """Show mean scores with their intervals and what they rest on."""
    rows = [
        (
            {"pos": "positive", "neg": "negative"}.get(one.group, one.group or "all"),
            one.metric,
            with_interval(one.score.mean, one.score.low, one.score.high),
            one.score.n,
            one.score.missing,
        )
        for one in means
    ]
    console.print(table(("answers", "score", "mean [95 %]", "n", "missing"), rows))


def render_filter(console: Console, filtered: Mapping[Sign, Mapping[Any, int]]) -> None:
    """Show how many answers count towards the vector and why the others do not."""
    from pvec.vectors.filter import REASONS

    shown = [r for r in REASONS if r == "kept" or any(c[r] for c in filtered.values())]
    words = {"pos": "positive", "neg": "negative"}
    rows = [(words[sign], *(counts[r] for r in shown)) for sign, counts in filtered.items()]
    console.print(table(("answers", *(REASONS[r] for r in shown)), rows))


def _render_layers(console: Console, summary: VectorSummary) -> None:
    rows = [
        (
            f"{row.layer}{' *' if row.layer == summary.suggested_layer else ''}",
            row.norm,
            row.relative_norm,
            _interval(row, "auc"),
            _interval(row, "stability"),
        )
        for row in summary.layers
    ]
    columns = ("layer", "norm", "norm / residual", "separation (AUC)", "split-half cosine")
    console.print(table(columns, rows))
    console.print(f"* suggested layer {summary.suggested_layer}: {summary.reason}")


def _interval(row: LayerRow, name: str) -> str:
    value = getattr(row, name)
    return with_interval(value.mean, value.low, value.high, digits=2)
