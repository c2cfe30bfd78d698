"""How ``pvec vector`` shows its results to people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pvec.cli.console import Console, table, with_interval
from pvec.cli.extract import TINY_NOTE, render_filter

if TYPE_CHECKING:
    from pvec.extraction.compute import ComputeResult, Thinking
    from pvec.vectors.edit import Written
    from pvec.vectors.hub import PullResult
    from pvec.vectors.lens import Lens, TokenScore
    from pvec.vectors.quality import Spread, VectorSummary
    from pvec.vectors.show import Comparison, Shown

BAR_WIDTH = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"

_PROVENANCE = {
    "model_id": "model",
    "adapter": "adapter",
    "dtype": "number format",
    "judge": "judge",
    "threshold": "trait threshold",
    "min_coherence": "least coherence",
    "paired": "paired filter",
    "seed": "seed",
    "source": "made from",
    "expression": "combination",
    "orthogonal_to": "orthogonal to",
    "source_format": "format",
    "pvec_version": "pvec",
}


def render_computed(console: Console, result: ComputeResult) -> None:
    """Show what was kept, how much was thinking, and the vector's quality."""
    render_filter(console, result.filtered)
    _render_thinking(console, result.thinking)
    if result.empty:
        console.out.print(
            f"{result.empty:,} kept answers are empty and do not count towards response_avg"
        )
    if result.merged:
        console.out.print(
            f"{result.merged:,} answers share their first token with the prompt's end; it counts "
            f"as theirs"
        )
    render_layers(console, result.summary)
    for line in (f"vector: {result.path}", *(f"next:   {command}" for command in result.next)):
        console.out.print(line, markup=False, soft_wrap=True)
    if result.model == "tiny":
        console.note(TINY_NOTE)


def render_shown(console: Console, found: Sequence[Shown]) -> None:
    """Show each file: where it comes from, its layers, and what it does not hold."""
    for one in found:
        console.out.print(
            f"[bold]{one.trait}[/bold] {one.kind}: {one.num_layers} layers, {one.hidden_size} wide"
        )
        console.out.print(f"  {one.path}", markup=False, soft_wrap=True)
        for line in _provenance(one):
            console.out.print(f"  {line}", markup=False)
        render_layers(console, one.summary)
        others = [kind for kind in one.norms if kind != one.kind]
        if others:
            middle = one.summary.suggested_layer or len(one.summary.layers) // 2
            listed = ", ".join(f"{kind} {one.norms[kind][middle]:.3g}" for kind in others)
            console.out.print(f"other kinds' norms at layer {middle}: {listed}", markup=False)
        for note in one.notes:
            console.out.print(f"note: {note}", markup=False)


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
        if not all(math.isnan(one.mean) for one in spreads):
            columns[word] = [_spread(one) for one in spreads]
    console.print(table(list(columns), list(zip(*columns.values(), strict=True))))
    if summary.suggested_layer is not None:
        console.print(f"* suggested layer {summary.suggested_layer}: {summary.reason}")


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
    for note in result.notes:
        console.out.print(f"note: {note}", markup=False)


def render_lens(console: Console, seen: Lens) -> None:
    """Show promoted and suppressed tokens side by side."""
    console.out.print(
        f"{seen.trait} {seen.kind} at {seen.where} in {seen.model}, through the final norm and the "
        f"unembedding",
        markup=False,
    )
    rows = [
        (_quoted(up), f"{up.score:+.2f}", _quoted(down), f"{down.score:+.2f}")
        for up, down in zip(seen.promoted, seen.suppressed, strict=True)
    ]
    console.print(table(("promotes", "logit", "suppresses", "logit"), rows))
    for note in seen.notes:
        console.out.print(f"note: {note}", markup=False)


def render_written(console: Console, made: Written) -> None:
    """Show which files were written and what should be known of them."""
    for path in made.paths:
        console.out.print(f"{made.trait}: {path}", markup=False, soft_wrap=True)
    for note in made.notes:
        console.out.print(f"note: {note}", markup=False)


def render_pulled(console: Console, done: PullResult) -> None:
    """Show what was fetched."""
    rows = [(one.trait, one.model or "–", str(one.path)) for one in done.files]
    console.print(table(("trait", "model", "file"), rows))


def bar(value: float, longest: float) -> str:
    """Return ``value`` as a bar of block characters, ``BAR_WIDTH`` for ``longest``."""
    eighths = round(8 * BAR_WIDTH * value / longest) if longest else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _render_thinking(console: Console, thinking: Thinking) -> None:
    if not thinking.answers:
        return
    counts = "counts" if thinking.averaged else "does not count"
    console.out.print(
        f"{thinking.answers:,} of {thinking.of:,} answers think; that is {thinking.share:.1%} of "
        f"all answer tokens and {counts} towards the vector"
    )


def _provenance(one: Shown) -> list[str]:
    meta = one.metadata
    lines = []
    if meta.get("kept_pos"):
        dropped = f" ({meta.get('dropped_pos', '?')} and {meta.get('dropped_neg', '?')} dropped)"
        lines.append(f"{meta['kept_pos']} positive, {meta['kept_neg']} negative answers{dropped}")
    metadata = [f"{word} {meta[key]}" for key, word in _PROVENANCE.items() if meta.get(key)]
    return [*lines, ", ".join(metadata)] if metadata else lines


def _spread(one: Spread) -> str:
    if math.isnan(one.low):  # a file of another tool may hold no intervals
        return "–" if math.isnan(one.mean) else f"{one.mean:.2f}"
    return with_interval(one.mean, one.low, one.high, digits=2)


def _quoted(token: TokenScore) -> str:
    return repr(token.text)


def _hundredths(cosine: float) -> str:
    return "–" if math.isnan(cosine) else f"{100 * cosine:.0f}"


def _print_narrow(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a grid whose lines are as long as they are: they scroll rather than fold."""
    grid = [columns, *rows]
    first = max(len(row[0]) for row in grid)
    wide = max(len(cell) for row in grid for cell in row[1:]) + 1
    for row in grid:
        line = row[0].ljust(first) + "".join(cell.rjust(wide) for cell in row[1:])
        console.out.print(line, markup=False, soft_wrap=True)
