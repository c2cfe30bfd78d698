"""A grid of runs: models by traits as one table and picture, then what was steered and shifted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from pvec.evaluation.summary import COHERENCE, SweepSummary
from pvec.report.axes import SCORE_AXIS, XAxis
from pvec.report.dots import bars
from pvec.report.figure import Cell, Difference, Figure, Table
from pvec.report.figures import Line, Panel, line_chart
from pvec.report.grids import Grid, heat_map
from pvec.report.page import Chapter, Section
from pvec.report.sections.common import listed
from pvec.report.sections.grid_numbers import (
    Cosines,
    GridNumbers,
    GridRuns,
    ShiftCell,
    TraitInModel,
)
from pvec.report.sections.sweeps import sweep_lines
from pvec.runs.grid import GridCell
from pvec.runs.names import model_label
from pvec.stats import Interval

_BARS = 12
"""Up to so many models and traits are drawn as bars; the heat maps have them all."""

_MULTIPLES = 30
"""Up to so many curves are drawn beside each other; the table has them all."""

_APART = (
    "Models that were trained apart share no basis, so the cosine of their vectors is expected to "
    "be near 0 whatever they mean; it compares finetunes of one base."
)


def build(runs: GridRuns, numbers: GridNumbers) -> Chapter:
    """Return the sections of a grid: its vectors, its sweeps, its shifts, and every cell."""
    name = runs.grid.path.resolve().name
    sections = [_vectors(numbers, name)]
    if numbers.steering:
        sections.append(_steering(numbers, runs.sweeps))
    if numbers.shifts:
        sections.append(_shifts(numbers.shifts))
    sections.append(_cells(numbers.cells))
    return Chapter(
        summary=sections[0].summary,
        sections=tuple(replace(section, source=f"grid {name}") for section in sections),
    )


def _vectors(numbers: GridNumbers, name: str) -> Section:
    models = listed(item.model for item in numbers.traits)
    done = sum(cell.state == "done" for cell in numbers.cells)
    notes = [] if done == len(numbers.cells) else [_unfinished(numbers.cells)]
    if numbers.model_cosines:
        notes.append(_APART)
    return Section(
        id="grid",
        title=f"Grid {name}",
        summary=(
            f"{listed(item.trait for item in numbers.traits)} in {models}: "
            f"{done} of {len(numbers.cells)} runs are done.{_alike(numbers.traits)}"
        ),
        notes=tuple(notes),
        figures=tuple(_vector_figures(numbers)),
        tables=(("Every model and trait", _trait_table(numbers.traits)),),
    )


def _alike(traits: Sequence[TraitInModel]) -> str:
    """Say in a sentence where the suggested layers lie and how alike the vectors of seeds are."""
    depths = [round(100 * item.depth) for item in traits if item.depth is not None]
    cosines = [item.seed_cosine.mean for item in traits if item.seed_cosine is not None]
    ends = " to ".join(map(str, sorted({min(depths), max(depths)}))) if depths else ""
    text = f" Suggested layers lie at {ends} % of depth" if depths else ""
    if cosines:
        text += f"; the cosine between the vectors of two seeds is {min(cosines):.3f} or more"
    return text and f"{text}."


def _unfinished(cells: Sequence[GridCell]) -> str:
    failed = sum(cell.state == "failed" for cell in cells)
    pending = sum(cell.state == "pending" for cell in cells)
    return (
        f"{failed} runs failed and {pending} are not finished; they are in no number here. The "
        f"same command goes on with them."
    )


def _trait_table(traits: Sequence[TraitInModel]) -> Table:
    columns = (
        "model", "trait", "positive (95 %)", "negative (95 %)", "unsteered (95 %)", "answers",
        "layer", "% of depth", "cosine of seeds (range)", "seeds", "split-half cosine",
    )  # fmt: skip
    rows = tuple(
        (
            item.model,
            item.trait,
            item.positive,
            item.negative,
            item.unsteered,
            item.positive.n if item.positive else None,
            item.layer,
            None if item.depth is None else round(100 * item.depth),
            item.seed_cosine,
            len(item.seeds),
            _split_half(item),
        )
        for item in traits
    )
    return Table(columns=columns, rows=rows)


def _split_half(item: TraitInModel) -> float | None:
    """Return the mean over seeds."""
    known = [seed.split_half.mean for seed in item.seeds if seed.split_half is not None]
    return sum(known) / len(known) if known else None


def _vector_figures(numbers: GridNumbers) -> Iterator[Figure]:
    """Yield models by traits, and cosines between them; what no run has is left out."""

    def by_pair(value: Callable[[TraitInModel], float | None]) -> dict[tuple[str, str], float]:
        found = {(item.model, item.trait): value(item) for item in numbers.traits}
        known = any(number is not None for number in found.values())
        return {k: math.nan if v is None else v for k, v in found.items()} if known else {}

    scores = by_pair(lambda item: item.positive.mean if item.positive else None)
    if scores and len(scores) <= _BARS:
        yield _score_bars(numbers.traits)
    elif scores:
        yield heat_map(
            Grid.of_pairs(scores, rows="model", columns="trait", value_label="trait score"),
            name="grid_scores",
            title="Trait score under positive instructions",
            caption="Mean over all seeds.",
        )
    if depths := by_pair(lambda item: item.depth and 100 * item.depth):
        yield heat_map(
            Grid.of_pairs(depths, rows="model", columns="trait", value_label="% of depth"),
            name="grid_depth",
            title="Suggested layer as a share of depth",
            caption="The lower median over seeds, in per cent of all layers.",
        )
    if cosines := by_pair(lambda item: item.seed_cosine.mean if item.seed_cosine else None):
        grid = Grid.of_pairs(cosines, rows="model", columns="trait", value_label="cosine of seeds")
        yield heat_map(
            replace(grid, limits=(0.0, 1.0), scale="quality", digits=2),
            name="grid_seeds",
            title="Stability: cosine between seeds",
            caption="Mean over pairs of seeds, at the suggested layer (the lower median).",
        )
    for what, found in (("traits", numbers.trait_cosines), ("models", numbers.model_cosines)):
        for cosines_of in found:
            yield _cosine_map(cosines_of, what)


def _score_bars(traits: Sequence[TraitInModel]) -> Figure:
    series: dict[str, list[Interval | None]] = {
        "positive": [item.positive for item in traits],
        "negative": [item.negative for item in traits],
        "unsteered": [item.unsteered for item in traits],
    }
    return bars(
        name="grid_scores",
        title="Trait score of every model and trait",
        caption="Under positive and negative instructions and, where the grid was evaluated, "
        "without any; all seeds together.",
        label="trait score",
        groups=[f"{item.trait}, {item.model}" for item in traits],
        series={name: values for name, values in series.items() if any(values)},
    )


def _cosine_map(cosines: Cosines, what: str) -> Figure:
    layers = sorted(set(cosines.layers))
    at = f"layer {layers[0]}" if len(layers) == 1 else "equal share of depth"
    names = [
        name if len(layers) == 1 else f"{name} @ {layer}"
        for name, layer in zip(cosines.names, cosines.layers, strict=True)
    ]
    return heat_map(
        Grid.of_cosines(what, cosines.names, names, cosines.cosines),
        name=f"grid_{what}_{cosines.of}",
        title=f"Cosines between {what}: {cosines.of}",
        caption=f"Vectors averaged over seeds, at {at}.",
    )


def _steering(numbers: GridNumbers, sweeps: Sequence[tuple[GridCell, SweepSummary]]) -> Section:
    columns = ("model", "trait", "seed", "layer", "coef", "trait score (95 %)",
               "coherence (95 %)", "unsteered (95 %)", "random vector (95 %)")  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (
            cell.model, cell.trait, cell.seed, cell.where or "none", cell.coef, cell.score,
            cell.coherence, cell.unsteered, cell.random,
        )
        for cell in numbers.steering
    ]  # fmt: skip
    picked = sum(cell.score is not None for cell in numbers.steering)
    return Section(
        id="grid-steering",
        title="Steering: the best point of every run",
        summary=f"In {picked} of {len(sweeps)} evaluations a point kept enough coherence.",
        figures=tuple(_curves(sweeps)),
        tables=(
            ("Picked points, read on held-out questions", Table(columns=columns, rows=tuple(rows))),
        ),
    )


def _curves(sweeps: Sequence[tuple[GridCell, SweepSummary]]) -> Iterator[Figure]:
    """Yield small multiples: a panel per model and trait, with a line for each seed."""

    def place(item: tuple[GridCell, SweepSummary]) -> tuple[str, str]:
        return item[0].trait, item[0].model

    panels = [
        Panel(
            label=f"{trait}, {model}",
            lines=[line for cell, sweep in own for line in _lines(cell, sweep)],
            limits=SCORE_AXIS,
        )
        for (trait, model), own in groupby(sorted(sweeps, key=place), key=place)
    ]
    if 0 < len(panels) <= _MULTIPLES:
        yield line_chart(
            name="grid_curves",
            title="Trait and coherence by coefficient",
            caption="Mean scores at the picked layer (without a pick, at the first), a line for "
            "each seed; dashed: a random vector of the same norm.",
            x=XAxis(label="coefficient"),
            panels=panels,
            columns=2 if len(panels) in (2, 4) else min(len(panels), 3),
        )


def _lines(cell: GridCell, sweep: SweepSummary) -> Iterator[Line]:
    steered = sweep.having("steered")
    if steered:
        layers = sweep.picks[0].point.layers if sweep.picks else steered[0].layers
        trait, *control = sweep_lines(
            steered, layers, sweep, cell.trait, label="trait", random="random vector"
        )
        yield trait
        if COHERENCE in sweep.metrics:
            yield sweep_lines(steered, layers, sweep, COHERENCE, label="coherence")[0]
        yield from control


def _shifts(shifts: Sequence[ShiftCell]) -> Section:
    columns = ("model", "checkpoint", "trait", "seed", "layer", "shift (95 %)", "prompts")
    rows = tuple(
        (
            item.model, model_label(item.checkpoint), item.trait, item.seed, item.layer,
            Difference.of(item.shift), item.shift.n,
        )
        for item in shifts
    )  # fmt: skip
    furthest = max(shifts, key=lambda item: abs(item.shift.mean))
    return Section(
        id="grid-shifts",
        title="Finetuning shift of every checkpoint along every trait",
        summary=(
            f"{model_label(furthest.checkpoint)} moved furthest, along {furthest.trait}: "
            f"{furthest.shift.mean:+.3g} at layer {furthest.layer}."
        ),
        figures=tuple(_shift_maps(shifts)),
        tables=(("Shifts", Table(columns=columns, rows=rows)),),
    )


def _shift_maps(shifts: Sequence[ShiftCell]) -> Iterator[Figure]:
    """Yield checkpoints by traits, one figure per base model; the mean over seeds and layers."""
    for model in dict.fromkeys(item.model for item in shifts):
        own = [item for item in shifts if item.model == model]
        found: dict[tuple[str, str], list[float]] = {}
        for item in own:
            found.setdefault((item.checkpoint, item.trait), []).append(item.shift.mean)
        means = {pair: sum(values) / len(values) for pair, values in found.items()}
        most = max(abs(mean) for mean in means.values()) or 1.0
        grid = Grid.of_pairs(means, rows="checkpoint", columns="trait", value_label="shift")
        names = [model_label(name) for name in grid.rows[1]]
        yield heat_map(
            replace(
                grid, rows=("checkpoint", names), limits=(-most, most), scale="signed", digits=2
            ),
            name=f"grid_shift_{model}",
            title=f"Shift from {model}",
            caption="Projection of the last prompt token, checkpoint minus base; the mean over "
            "seeds and layers. Traits have vectors of their own: compare within a column.",
        )


def _cells(cells: Sequence[GridCell]) -> Section:
    rows = tuple(
        (cell.command, cell.model, cell.trait, str(cell.seed), cell.run, cell.state, cell.reason)
        for cell in cells
    )
    columns = ("command", "model", "trait", "seed", "run", "state", "reason")
    return Section(
        id="grid-cells",
        title="Every run of the grid",
        summary="`pvec report` of a run's folder shows its answers.",
        tables=(("Runs", Table(columns=columns, rows=rows)),),
    )
