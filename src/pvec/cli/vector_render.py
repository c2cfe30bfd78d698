"""What ``pvec vector`` shows: vector files, their cosines, tokens and percentiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pvec.cli.console import Console, table
from pvec.cli.render import (
    CLASSES,
    interval,
    render_filter,
    render_layers,
    render_next,
    render_notes,
)

if TYPE_CHECKING:
    from pvec.extraction.calibrate import CalibrateResult
    from pvec.extraction.compute import ComputeResult, Thinking
    from pvec.extraction.methods import MethodComparison
    from pvec.vectors.edit import VectorFiles
    from pvec.vectors.lens import Lens
    from pvec.vectors.show import Comparison, Percentiles, VectorDescription

_LONGEST_HEADING = 8
"""Characters over a column of cosines; longer names would break over several lines."""


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
    shown = [percentiles.percents.index(percent) for percent in (5, 25, 50, 75, 95)]
    rows = [
        (CLASSES.get(name, name), *(values[place] for place in shown))
        for name, values in percentiles.rows.items()
    ]
    console.print(table(("answers", *(f"{percentiles.percents[n]:g} %" for n in shown)), rows))
    console.print(
        f"percentiles of projections at layer {percentiles.layer}, for --operator cap and floor"
    )


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
    from pvec.vectors.hub import PROVENANCE

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
