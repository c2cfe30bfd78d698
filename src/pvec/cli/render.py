"""The tables that commands show: scores, filters, layers of a vector, cosines, tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pvec.cli.console import Console, table, with_interval
from pvec.vectors.card import PROVENANCE

if TYPE_CHECKING:
    from pvec.extraction.calibrate import CalibrateResult
    from pvec.extraction.compute import ComputeResult, Thinking
    from pvec.extraction.judge import MetricMean
    from pvec.extraction.methods import MethodComparison
    from pvec.judges.scoring import JudgeReport
    from pvec.stats import Correlation, Interval
    from pvec.types import Sign
    from pvec.vectors.edit import VectorFiles
    from pvec.vectors.lens import Lens
    from pvec.vectors.quality import Spread, VectorSummary
    from pvec.vectors.show import Comparison, Percentiles, VectorDescription

TINY_NOTE = (
    "The bundled model is a teaching aid: these numbers are about it, not about real assistants."
)

BAR_WIDTH = 10
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
            {"pos": "positive", "neg": "negative"}.get(mean.group, mean.group or "all"),
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
    words = {"pos": "positive", "neg": "negative"}
    rows = [(words[sign], *(counts[r] for r in reasons)) for sign, counts in filtered.items()]
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
        "": [bar(row.norm, longest) for row in summary.layers],
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


def render_computed(console: Console, result: ComputeResult) -> None:
    """Show what was kept, how much was thinking, and the vector's quality."""
    render_filter(console, result.filtered)
    _render_thinking(console, result.thinking)
    if result.empty:
        console.sentence(
            f"{result.empty:,} kept answers are empty and do not count towards response_avg"
        )
    if result.merged:
        console.sentence(
            f"{result.merged:,} answers share their first token with the prompt's end; it counts "
            f"as theirs"
        )
    render_layers(console, result.summary)
    console.print(f"vector: {result.path}")
    render_next(console, result.next, model=result.model)


def render_descriptions(console: Console, vectors: Sequence[VectorDescription]) -> None:
    """Show where each vector file comes from, its layers, and what it does not hold."""
    for vector in vectors:
        _render_description(console, vector)


def _render_description(console: Console, vector: VectorDescription) -> None:
    console.print(
        f"{vector.trait} {vector.kind}: {vector.num_layers} layers, {vector.hidden_size} wide"
    )
    console.print(f"  {vector.path}")
    for line in _provenance(vector.metadata):
        console.sentence(f"  {line}")
    render_layers(console, vector.summary)
    others = [kind for kind in vector.norms if kind != vector.kind]
    if others:
        middle = vector.summary.suggested_layer or len(vector.summary.layers) // 2
        listed = ", ".join(f"{kind} {vector.norms[kind][middle]:.3g}" for kind in others)
        console.print(f"other kinds' norms at layer {middle}: {listed}")
    render_percentiles(console, vector.percentiles)
    render_notes(console, vector.notes)


def render_calibrated(console: Console, result: CalibrateResult) -> None:
    """Say how many answers were measured, and where they lie beside the others."""
    console.print(
        f"{result.answers:,} unsteered answers to {result.questions} questions, measured into "
        f"{result.path}"
    )
    render_percentiles(console, result.percentiles)
    render_next(console, result.next, model=result.model)


def render_percentiles(console: Console, percentiles: Percentiles) -> None:
    """Show where each class's answers lie along a vector at one layer."""
    if not percentiles.rows:
        return
    words = {"neg": "negative", "unsteered": "unsteered", "pos": "positive"}
    shown = [percentiles.percents.index(percent) for percent in (5, 25, 50, 75, 95)]
    rows = [
        (words[name], *(values[place] for place in shown))
        for name, values in percentiles.rows.items()
    ]
    console.print(table(("answers", *(f"{percentiles.percents[n]:g} %" for n in shown)), rows))
    console.print(
        f"percentiles of projections at layer {percentiles.layer}, for --operator cap and floor"
    )


def render_notes(console: Console, notes: Sequence[str]) -> None:
    """Show what the user should know about a result."""
    for note in notes:
        console.sentence(f"note: {note}")


_LONGEST_HEADING = 8
"""Characters over a column of cosines; longer names would break over several lines."""


def render_cosines(console: Console, result: Comparison) -> None:
    """Show the matrix; columns with long names get numbers, large ones two digits a cell."""
    if len(result.labels) > 8:
        columns = ("", *(label.rpartition(" ")[2] for label in result.labels))
        rows = [
            (label, *(_hundredths(c) for c in row))
            for label, row in zip(result.labels, result.cosines, strict=True)
        ]
        console.print("cosines in hundredths")
        _print_narrow(console, columns, rows)
    else:
        names, headings = result.labels, result.labels
        if max(map(len, names)) > _LONGEST_HEADING:
            headings = tuple(str(number) for number in range(1, len(names) + 1))
            names = tuple(f"{n} {label}" for n, label in zip(headings, names, strict=True))
        cells = [
            (label, *("–" if math.isnan(c) else f"{c:.3f}" for c in row))
            for label, row in zip(names, result.cosines, strict=True)
        ]
        console.print(table(("cosine", *headings), cells))
    if result.layer is not None:
        console.print(f"at layer {result.layer}")
    render_notes(console, result.notes)


def render_methods(console: Console, result: MethodComparison) -> None:
    """Show each method's quality on the same answers."""
    console.print(
        f"{result.trait} {result.kind} in {result.model} at layer {result.layer}: "
        f"{result.answers['pos']:,} positive, {result.answers['neg']:,} negative answers to "
        f"{result.questions} questions, {result.pairs:,} pairs"
    )
    rows = [
        (
            row.method,
            interval(row.auc, digits=3),
            interval(row.stability, digits=3),
            f"{row.cosine:.3f}",
        )
        for row in result.rows
    ]
    columns = ("method", "held-out AUC [95 %]", "split-half [95 %]", "cosine to mean_diff")
    console.print(table(columns, rows))


def render_lens(console: Console, result: Lens) -> None:
    """Show promoted and suppressed tokens side by side."""
    console.print(
        f"{result.trait} {result.kind} at {result.where} in {result.model}, through the final norm "
        f"and the unembedding"
    )
    rows = [
        (repr(up.text), f"{up.score:+.2f}", repr(down.text), f"{down.score:+.2f}")
        for up, down in zip(result.promoted, result.suppressed, strict=True)
    ]
    console.print(table(("promotes", "logit", "suppresses", "logit"), rows))
    render_notes(console, result.notes)


def render_files(console: Console, result: VectorFiles) -> None:
    """Show which files were written and what the user should know about them."""
    for path in result.paths:
        console.print(f"{result.trait}: {path}")
    render_notes(console, result.notes)


def bar(value: float, longest: float) -> str:
    """Return ``value`` as a bar of block characters, ``BAR_WIDTH`` for ``longest``."""
    eighths = round(8 * BAR_WIDTH * value / longest) if longest else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _render_thinking(console: Console, thinking: Thinking) -> None:
    from pvec.data.spans import thinking_note

    if not thinking.answers:
        return
    if thinking.averaged:
        console.print(
            f"{thinking.answers:,} of {thinking.of:,} answers think; that is {thinking.share:.1%} "
            f"of all answer tokens and counts towards the vector"
        )
        return
    console.print(
        f"{thinking.answers:,} of {thinking.of:,} {thinking_note(thinking.tokens)}, "
        f"{thinking.share:.1%} of all answer tokens"
    )


def _provenance(metadata: Mapping[str, str]) -> list[str]:
    lines = []
    if metadata.get("kept_pos"):
        dropped = [metadata.get(f"dropped_{sign}", "?") for sign in ("pos", "neg")]
        kept = [int(metadata[f"kept_{sign}"]) for sign in ("pos", "neg")]
        lines.append(
            f"{kept[0]:,} positive, {kept[1]:,} negative answers "
            f"({dropped[0]} and {dropped[1]} dropped)"
        )
    named = [f"{word} {metadata[key]}" for key, word in PROVENANCE.items() if metadata.get(key)]
    return [*lines, ", ".join(named)] if named else lines


def _spread(value: Spread) -> str:
    if math.isnan(value.low):  # a file of another tool may hold no intervals
        return "–" if math.isnan(value.mean) else f"{value.mean:.2f}"
    return with_interval(value.mean, value.low, value.high, digits=2)


def _hundredths(cosine: float) -> str:
    return "–" if math.isnan(cosine) else f"{100 * cosine:.0f}"


def _print_narrow(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a grid whose lines are as long as they are: they scroll rather than fold."""
    grid = [columns, *rows]
    first = max(len(row[0]) for row in grid)
    wide = max(len(cell) for row in grid for cell in row[1:]) + 1
    for row in grid:
        line = row[0].ljust(first) + "".join(cell.rjust(wide) for cell in row[1:])
        console.print(line)


def render_blocks(console: Console, blocks: int, resumed: int, left_out: int) -> None:
    """Show how a job on blocks went."""
    if resumed:
        console.print(f"  {resumed:,} of {blocks:,} blocks done before")
    if left_out:
        console.print(f"  {left_out:,} rows left out that cannot be used")
