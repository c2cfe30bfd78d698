"""What several commands show: scores, filters, layers of a vector, plans, what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pvec.cli.console import Console, table, with_interval
from pvec.cli.progress import duration

if TYPE_CHECKING:
    from pvec.backends.resources import Resources
    from pvec.extraction.judge import MetricMean
    from pvec.judges.plan import RunPlan
    from pvec.judges.scoring import JudgeReport
    from pvec.projection.project_blocks import BlocksResult
    from pvec.projection.screen_blocks import ScreenBlocksResult
    from pvec.stats import Correlation, Interval
    from pvec.types import Sign
    from pvec.vectors.quality import Spread, VectorSummary

TINY_NOTE = (
    "The bundled model is a teaching aid: these numbers are about it, not about real assistants."
)
CLASSES: Mapping[str, str] = {"pos": "positive", "neg": "negative"}
"""Classes of answers in words."""

_BAR_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"


def interval(value: Interval | Spread, *, digits: int = 1) -> str:
    """Return ``71.3 [68.0, 74.1]``."""
    return with_interval(value.mean, value.low, value.high, digits=digits)


def intervals(values: Sequence[Interval | None]) -> list[str]:
    """Return the intervals of a table with the same decimals: none when one is above 100, as a
    table has 80 columns.
    """
    large = any(value is not None and abs(value.mean) > 100 for value in values)
    return ["–" if v is None else interval(v, digits=0 if large else 1) for v in values]


def r_interval(value: Correlation) -> str:
    """Return ``0.71 [0.60, 0.79]``; ``too few (4)`` of pairs that are no evidence of one."""
    from pvec.stats import FEW_PAIRS

    if value.n < FEW_PAIRS:
        return f"too few ({value.n})"
    return with_interval(value.r, value.low, value.high, digits=2)


def render_next(console: Console, commands: Sequence[str], *, model: str = "") -> None:
    """Show the commands to go on with, and what the bundled model is."""
    for position, command in enumerate(commands):
        console.print(f"{'next' if position == 0 else 'then'}:   {command}")
    if model == "tiny":
        console.note(TINY_NOTE)


def render_judge(console: Console, report: JudgeReport) -> None:
    """Say who judged, how much, what is missing, what it cost and what the scores mean."""
    from pvec.judges.prompts import score_meaning

    counts = ", ".join(f"{count:,} {status}" for status, count in report.counts.items())
    parts = [f"{counts or 'nothing new'}", f"{report.skipped:,} scored before"]
    if report.unasked:
        parts.append(f"{report.unasked:,} not asked ({report.stopped})")
    if report.spent:
        parts.append(f"${report.spent:.2f}")
    console.print(f"judge {report.judge}: {', '.join(parts)}")
    console.sentence(score_meaning(report.judge))


def render_means(console: Console, means: Sequence[MetricMean]) -> None:
    """Show mean scores with their intervals and what they rest on."""
    rows = [
        (
            CLASSES.get(mean.group, mean.group or "all"),
            mean.metric,
            interval(mean.score),
            mean.score.n,
            mean.score.missing,
        )
        for mean in means
    ]
    console.print(table(("answers", "score", "mean [95 %]", "n", "missing"), rows))


def render_filter(console: Console, filtered: Mapping[Sign, Mapping[Any, int]]) -> None:
    """Show how many answers count towards the vector and why the others do not."""
    from pvec.vectors.filter import REASONS

    reasons = [r for r in REASONS if r == "kept" or any(c[r] for c in filtered.values())]
    rows = [(CLASSES[sign], *(counts[r] for r in reasons)) for sign, counts in filtered.items()]
    console.print(table(("answers", *(REASONS[r] for r in reasons)), rows))


def render_layers(console: Console, summary: VectorSummary) -> None:
    """Plot the norms by layer, with norm / residual and quality where they are known.

    Norm / residual is the norm in mean residual norms of the layer; AUC says how well projections
    separate held-out positive from negative answers; split-half is the cosine between the vectors
    of two halves of the questions.
    """
    longest = max((row.norm for row in summary.layers), default=0.0)
    columns: dict[str, list[str] | list[float]] = {
        "layer": [
            f"{row.layer}{' *' if row.layer == summary.suggested_layer else ''}"
            for row in summary.layers
        ],
        "": [_bar(row.norm, longest) for row in summary.layers],
        "norm": [row.norm for row in summary.layers],
    }
    relative = [row.relative_norm for row in summary.layers]
    if not all(map(math.isnan, relative)):
        columns["norm /\nresidual"] = relative
    for name, word in (("auc", "AUC [95 %]"), ("stability", "split-half [95 %]")):
        spreads = [getattr(row, name) for row in summary.layers]
        if not all(math.isnan(spread.mean) for spread in spreads):
            columns[word] = [_spread(spread) for spread in spreads]
    console.print(table(list(columns), list(zip(*columns.values(), strict=True))))
    if summary.suggested_layer is not None:
        console.sentence(f"* suggested layer {summary.suggested_layer}: {summary.reason}")


def _spread(value: Spread) -> str:
    if math.isnan(value.low):  # a file of another tool may hold no intervals
        return "–" if math.isnan(value.mean) else f"{value.mean:.2f}"
    return interval(value, digits=2)


def _bar(value: float, longest: float) -> str:
    """Return ``value`` as a bar of block characters, ``_BAR_WIDTH`` for ``longest``."""
    eighths = round(8 * _BAR_WIDTH * value / longest) if longest else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def render_blocks(console: Console, result: BlocksResult | ScreenBlocksResult) -> None:
    """Show how a job on blocks went."""
    if result.resumed:
        console.print(f"  {result.resumed:,} of {result.blocks:,} blocks done before")
    if result.left_out:
        console.print(f"  {result.left_out:,} rows left out that cannot be used")


def render_notes(console: Console, notes: Sequence[str]) -> None:
    """Show what the user should know about a result."""
    for note in notes:
        console.sentence(f"note: {note}")


def render_plan(console: Console, plan: RunPlan, *, head: str = "") -> None:
    """Say what a command would generate and judge, and what that takes; ``head`` begins it."""
    console.print(
        f"{head}{plan.missing:,} of {plan.answers:,} answers to generate "
        f"(at most {plan.most_tokens:,} tokens) into {plan.run}"
    )
    console.print(f"  judge {plan.judge}: {plan.judging}")
    if plan.resources is not None:
        _render_resources(console, plan.resources)


def _render_resources(console: Console, needs: Resources) -> None:
    """Say how much memory and how many workers a command takes, and about how long."""
    each = " on each worker" if needs.workers else ""
    console.print(
        f"  memory: {_bytes(needs.memory_bytes)}{each}: {_bytes(needs.weight_bytes)} of weights "
        f"({needs.parameters / 1e6:,.0f} M parameters, {needs.dtype}), and {needs.rows:,} answers "
        f"at once"
    )
    free = _bytes(needs.free_bytes)
    if needs.gpus and not needs.times:
        console.print(f"  that does not fit: a worker needs {needs.gpus} GPUs (--worker-gpus)")
    elif needs.gpus is None:
        console.print(f"  that does not fit, on any number of GPUs of {free}")
    elif needs.gpus > 1:
        console.print(f"  one GPU is too small: {needs.gpus} of them have {free} together")
    elif needs.memory_bytes > needs.free_bytes:
        console.print(f"  that does not fit: {free} are free{each}")
    if not needs.times:
        return
    times = [
        duration(time.seconds)
        + (f" with {time.workers} worker{'s' * (time.workers > 1)}" if needs.workers else "")
        for time in needs.times
    ]
    console.sentence(
        f"  time: about {', '.join(times)} if all answers run to their limit ({needs.basis})"
    )


def _bytes(count: int) -> str:
    """Return a size in the units in which GPUs are sold."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"
